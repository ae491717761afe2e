"""Further entries of the catalog `published` at full size, see `test_published_sizes.py`: CLIP's
descendants, small CaiTs, DHVT, and networks of segmentation."""

from functools import partial

import open_clip
import pytest
from timm.models.cait import Cait
from torch import nn

from models.networks import create_own
from models.segmentation.decoders.necks import BeitNeck
from models.segmentation.decoders.uper import UperHead
from tests.models.published import (
    BUILDING,
    State,
    below,
    check,
    from_timm,
    in_convnexts_names,
    meta,
    on_meta,
    read,
    with_values,
)
from tests.models.test_published_entries import vit

__all__ = ["with_values"]


def clip(name: str) -> State:
    """CLIP's towers, under `visual.` and `text.`."""
    config = open_clip.get_model_config(name)
    return on_meta(lambda: open_clip.model.CustomTextCLIP(**config))


def test_a_clip() -> None:
    state = below("visual_ema.", vit()) | meta(image_projection_e=(768, 512), logit_scale=())
    for key, value in clip("ViT-B-16").items():
        name = key.removeprefix("text.").replace("transformer.", "transformer_e.")
        if key.startswith("text."):
            state[name.replace("text_projection", "text_projection_e")] = value
    checkpoint = read("aclip-vitb16-image", state, "state_dict")
    assert checkpoint.format == "a-clip"
    assert checkpoint.assumed == {"vision_heads": 12, "transformer_heads": 8}
    for tower, architecture in (("image", "projected-vit"), ("text", "clip-text")):
        found = {"architecture": architecture, **checkpoint.arguments[tower]}
        network = on_meta(partial(create_own, **found))
        own = below(f"{tower}.", network)
        assert {key: value.shape for key, value in own.items()} == {
            key: value.shape
            for key, value in checkpoint.state_dict.items()
            if key.startswith(f"{tower}.")
        }


@pytest.mark.parametrize(
    ("entry", "name", "width", "heads"),
    [("ft-clip-b16", "ViT-B-16", 768, 12), ("ft-clip-l14", "ViT-L-14", 1024, 16)],
)
def test_ft_clip(entry: str, name: str, width: int, heads: int) -> None:
    state = {
        key.removeprefix("visual.").replace("ln_post.", "fc_norm."): value
        for key, value in clip(name).items()
        if key.startswith("visual.") and key != "visual.proj"
    }
    state |= meta(head__weight=(1000, width), head__bias=(1000,))
    checkpoint = read(entry, state, "model", sets={"model": state, "model_ema": state})
    assert checkpoint.format == "ft-clip"
    check(checkpoint, num_heads=heads, num_classes=1000, input_size=(224, 224), crop_pct=1.0)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_small_scale_caits(dataset: str) -> None:
    """24 blocks of four heads; patches are embedded by a linear layer."""
    classes = int(dataset.removeprefix("cifar"))
    state = on_meta(
        lambda: Cait(
            img_size=32, patch_size=4, embed_dim=192, depth=24, num_heads=4, mlp_ratio=2.0,
            depth_token_only=2, mlp_ratio_token_only=4.0, num_classes=classes,
        )
    )  # fmt: skip
    bias = state.pop("patch_embed.proj.bias")
    state["patch_embed.1.weight"] = state.pop("patch_embed.proj.weight").flatten(1)
    state["patch_embed.1.bias"] = bias
    checkpoint = read(f"small-cait-{dataset}", state, "model_state_dict")
    check(
        checkpoint, num_heads=4, depth=24, mlp_ratio=2.0, patch_size=4, num_classes=classes,
        input_size=(32, 32), interpolation="bilinear",
    )  # fmt: skip


def test_dhvt() -> None:
    state = on_meta(
        lambda: create_own(
            "dhvt", patch_size=16, embed_dim=384, depth=12, num_heads=6, hidden=1536,
            qkv_bias=True, num_classes=1000,
        )
    )  # fmt: skip
    checkpoint = read("dhvt-s", state, "model", sets={"model": state})
    check(checkpoint, num_heads=6, depth=12, patch_size=16, input_size=(224, 224), crop_pct=0.875)


# -- segmentation ------------------------------------------------------------------------------


def upernet(
    entry: str, backbone: State, dims: list[int], channels: int, kind: str, side: int
) -> None:
    """Read a segmentor, and check its decoder and its windows."""
    BUILDING.reference = None  # which has a norm and a pooling that the decoder does not read
    head = on_meta(lambda: UperHead(dims, channels, 150, (1, 2, 3, 6)))
    state = below("backbone.", backbone) | below("decode_head.", head)
    stride = side * 2 // 3
    config = (
        f"model = dict(type='EncoderDecoder', backbone=dict({kind}), "
        "decode_head=dict(type='UPerHead', in_index=[0, 1, 2, 3]), "
        f"test_cfg=dict(mode='slide', crop_size=({side}, {side}), stride=({stride}, {stride})))"
    )
    checkpoint = read(entry, state, "state_dict", beside={"meta": {"config": config}})
    check(checkpoint)
    settings = checkpoint.heads["semantic"].settings
    assert settings["inputs"] == dims
    assert settings["labels"] == "ade20k-150"
    assert settings["windows"]["crop"] == [side, side]
    assert settings["windows"]["stride"] == [stride, stride]


CONVNEXTS = {"tiny": 96, "small": 96, "base": 128, "large": 192, "xlarge": 256}


@pytest.mark.parametrize(
    "name",
    ["tiny-1k-512x512", "small-1k-512x512", "base-1k-512x512", "base-22k-640x640",
     "large-22k-640x640", "xlarge-22k-640x640"],
)  # fmt: skip
def test_upernet_on_convnext(name: str) -> None:
    size, side = name.split("-")[0], int(name[-3:])
    dims = [CONVNEXTS[size] * 2**stage for stage in range(4)]
    state = in_convnexts_names(from_timm(f"convnext_{size}", num_classes=0))
    state = {key: value for key, value in state.items() if not key.startswith("norm.")}
    for stage, dim in enumerate(dims):
        state |= below(f"norm{stage}.", on_meta(partial(nn.LayerNorm, dim)))
    upernet(f"upernet-convnext-{name}", state, dims, 512, "type='ConvNeXt'", side)


@pytest.mark.parametrize(
    ("size", "dim", "blocks"), [("base", 768, [3, 5, 7, 11]), ("large", 1024, [7, 11, 15, 23])]
)
def test_upernet_on_beit(size: str, dim: int, blocks: list[int]) -> None:
    state = from_timm(f"beit_{size}_patch16_224", img_size=640, num_classes=0)
    state = {key: value for key, value in state.items() if not key.startswith("fc_norm.")}
    state |= on_meta(lambda: BeitNeck(dim, 16))
    kind = f"type='BEiT', img_size=640, out_indices={blocks}"
    upernet(f"beit-{size}-ade20k", state, [dim] * 4, dim, kind, 640)
