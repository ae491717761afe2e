"""The catalog `published` at full size: entries and shapes determine the published networks.

References are timm's and open_clip's networks of those names, under the authors' names for their
weights; no memory is allocated for either.
"""

import re
from functools import partial

import open_clip
import pytest
import torch

from models.networks import create_own
from tests.models.published import (
    check,
    compare_towers,
    from_timm,
    in_convnexts_names,
    on_meta,
    read,
    reference,
    with_values,
)

__all__ = ["with_values"]

VITS = {"vits": ("vit_small", 6), "vitb": ("vit_base", 12), "vitl": ("vit_large", 16)}


@pytest.mark.parametrize("name", ["vits16", "vits8", "vitb16", "vitb8"])
def test_dino(name: str) -> None:
    size, heads = VITS[name.rstrip("0123456789")]
    patch = int(name[4:])
    state = from_timm(f"{size}_patch{patch}_224", num_classes=0)
    entry = f"dino-{name}"
    check(read(entry, state), num_heads=heads, patch_size=patch, input_size=(224, 224))


@pytest.mark.parametrize(("size", "heads"), [("base", 12), ("large", 16), ("huge", 16)])
def test_mae(size: str, heads: int) -> None:
    """ViT-H has heads of 80 channels and patches of 14 pixels."""
    patch = 14 if size == "huge" else 16
    plain = from_timm(f"vit_{size}_patch{patch}_224", num_classes=0)
    check(read(f"mae-vit-{size}", plain, "model"), num_heads=heads, patch_size=patch)
    tuned = from_timm(f"vit_{size}_patch{patch}_224", global_pool="avg", num_classes=1000)
    check(read(f"mae-vit-{size}-in1k", tuned, "model"), num_heads=heads, num_classes=1000)


@pytest.mark.parametrize("size", ["s", "b"])
def test_moco_v3(size: str) -> None:
    """Its ViT-S has 12 heads of 32 channels."""
    name = {"s": "vit_small", "b": "vit_base"}[size]
    base = from_timm(f"{name}_patch16_224", num_heads=12, num_classes=0)
    state = {f"{part}_encoder.{k}": v for part in ("base", "momentum") for k, v in base.items()}
    check(read(f"mocov3-vit{size}", state, "state_dict"), num_heads=12, input_size=(224, 224))


PITS = {"ti": [2, 4, 8], "xs": [2, 4, 8], "s": [3, 6, 12], "b": [4, 8, 16]}


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("size", PITS)
def test_pit(size: str, distilled: bool) -> None:
    state = from_timm(f"pit_{size}{'_distilled' if distilled else ''}_224")

    def theirs(key: str) -> str:
        return re.sub(r"^transformers\.(\d)\.pool\.", lambda m: f"pools.{int(m[1]) - 1}.", key)

    entry = f"pit-{size}{'-distill' if distilled else ''}"
    stride = 7 if size == "b" else 8
    checkpoint = read(entry, {theirs(key): value for key, value in state.items()})
    check(checkpoint, heads=PITS[size], stride=stride, input_size=(224, 224), crop_pct=0.9)


def test_pyramid_tnt() -> None:
    """PyramidTNT-S, by `ptnt_s_patch16_256` of its code."""
    outer, inner = [128, 256, 512, 512], [8, 16, 32, 32]
    sizes = {"depths": [2, 8, 4, 2], "outer_dims": outer, "inner_dims": inner, "img_size": 256,
             "inner_heads": [2, 4, 8, 8], "outer_heads": [4, 8, 16, 16], "qkv_bias": False,
             "reductions": [4, 2, 1, 1], "mlp_ratio": 4.0, "num_classes": 1000}  # fmt: skip
    state = on_meta(lambda: create_own("pyramid-tnt", **sizes))
    checkpoint = read("pyramidtnt-s", state, "state_dict_ema", sets={"state_dict_ema": state})
    check(checkpoint, inner_heads=[2, 4, 8, 8], outer_heads=[4, 8, 16, 16], input_size=(256, 256))


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_small_scale_swin(dataset: str) -> None:
    """Swins for images of 32 pixels: patches of 2, windows of 4."""
    sizes = {"img_size": 32, "patch_size": 2, "embed_dim": 96, "depths": [2, 6, 4],
             "num_heads": [3, 6, 12], "window_size": 4, "mlp_ratio": 2.0,
             "num_classes": int(dataset.removeprefix("cifar"))}  # fmt: skip
    state = on_meta(lambda: create_own("swin", **sizes))

    def theirs(key: str) -> str:
        key = re.sub(
            r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
        )
        return key.replace("head.fc.", "head.")

    renamed = {theirs(key): value for key, value in state.items()}
    checkpoint = read(f"small-swin-{dataset}", renamed, "model_state_dict")
    check(checkpoint, input_size=(32, 32), num_heads=[3, 6, 12], window_size=4, patch_size=2)


MVITS = {"t": ("tiny", [1, 2, 4, 8]), "s": ("small", [1, 2, 4, 8]), "b": ("base", [1, 2, 4, 8]),
         "l": ("large", [2, 4, 8, 16])}  # fmt: skip
DEPTHS = {"t": (1, 2, 5, 2), "s": (1, 2, 11, 2), "b": (2, 3, 16, 3), "l": (2, 6, 36, 4)}


@pytest.mark.parametrize("size", MVITS)
def test_mvit_v2(size: str) -> None:
    """By timm's networks and the configurations of github.com/facebookresearch/mvit."""
    name, heads = MVITS[size]
    depths = DEPTHS[size]
    state = from_timm(f"mvitv2_{name}")
    starts = [sum(depths[:stage]) for stage in range(4)]

    def theirs(key: str) -> str:
        key = re.sub(
            r"^stages\.(\d)\.blocks\.(\d+)\.",
            lambda m: f"blocks.{starts[int(m[1])] + int(m[2])}.",
            key,
        )
        key = re.sub(r"\.shortcut_proj_(attn|mlp)\.", ".proj.", key)
        return key.replace("head.fc.", "head.projection.")

    pools = [[n, 2, 2] if n in starts[1:] else [n, 1, 1] for n in range(sum(depths))]
    mvit = {
        "DEPTH": sum(depths), "EMBED_DIM": 144 if size == "l" else 96, "NUM_HEADS": heads[0],
        "DIM_MUL": [[n, 2.0] for n in starts[1:]], "HEAD_MUL": [[n, 2.0] for n in starts[1:]],
        "POOL_KVQ_KERNEL": [3, 3], "POOL_KV_STRIDE_ADAPTIVE": [4, 4], "POOL_Q_STRIDE": pools,
        "DIM_MUL_IN_ATT": size != "l",
    }  # fmt: skip
    config = repr({"MVIT": mvit, "DATA": {"TRAIN_CROP_SIZE": 224}})
    renamed = {theirs(key): value for key, value in state.items()}
    checkpoint = read(f"mvitv2-{size}-in1k", renamed, "model_state", beside={"cfg": config})
    check(checkpoint, input_size=(224, 224), num_classes=1000, mean=(0.485, 0.456, 0.406))
    counts = [block["num_heads"] for block in checkpoint.arguments["blocks"]]
    assert counts == [h for h, depth in zip(heads, depths, strict=True) for _ in range(depth)]


CLIPS = {"rn50": "RN50", "rn101": "RN101", "rn50x4": "RN50x4", "rn50x16": "RN50x16",
         "rn50x64": "RN50x64", "vit-b-32": "ViT-B-32", "vit-b-16": "ViT-B-16",
         "vit-l-14": "ViT-L-14", "vit-l-14-336px": "ViT-L-14-336"}  # fmt: skip


@pytest.mark.parametrize("name", CLIPS)
def test_clip(name: str) -> None:
    config = open_clip.get_model_config(CLIPS[name])
    text, vision = config["text_cfg"], config["vision_cfg"]
    state = reference(lambda: open_clip.model.CLIP(**config | {"quick_gelu": True}))
    for setting in ("input_resolution", "context_length", "vocab_size"):
        state[setting] = torch.zeros((), device="meta")
    checkpoint = read(f"clip-{name}-image", state)
    assert checkpoint.format == "openai-clip"
    for tower, own in (("image", vision), ("text", text)):
        found = checkpoint.arguments[tower]
        assert found["quick_gelu"]
        for key, value in own.items():
            if key in found["config"] and value is not None:
                assert found["config"][key] == value, f"{tower} {key}"
        network = on_meta(partial(create_own, **found))
        kept = {
            key.removeprefix(f"{tower}."): tuple(value.shape)
            for key, value in checkpoint.state_dict.items()
            if key.startswith(f"{tower}.")
        }
        assert kept == {key: tuple(value.shape) for key, value in network.items()}
    size = vision["image_size"]
    assert checkpoint.preprocess is not None
    assert checkpoint.preprocess.input_size == (size, size)
    compare_towers(checkpoint)


@pytest.mark.parametrize(("size", "heads"), [("base", 12), ("large", 16)])
@pytest.mark.parametrize(("tag", "classes"), [("in22k", 21841), ("in1k", 1000)])
def test_beit(size: str, heads: int, tag: str, classes: int) -> None:
    state = from_timm(f"beit_{size}_patch16_224", num_classes=classes)
    checkpoint = read(f"beit-{size}-{tag}", state, "model")
    check(checkpoint, num_heads=heads, num_classes=classes, input_size=(224, 224))
    assert checkpoint.preprocess is not None
    assert checkpoint.preprocess.mean == (0.5, 0.5, 0.5)


CONVNEXTS = {"atto": ([2, 2, 6, 2], 40), "femto": ([2, 2, 6, 2], 48), "pico": ([2, 2, 6, 2], 64),
             "nano": ([2, 2, 8, 2], 80), "tiny": ([3, 3, 9, 3], 96), "base": ([3, 3, 27, 3], 128),
             "large": ([3, 3, 27, 3], 192), "huge": ([3, 3, 27, 3], 352)}  # fmt: skip


@pytest.mark.parametrize("size", CONVNEXTS)
def test_convnext_v2(size: str) -> None:
    state = in_convnexts_names(from_timm(f"convnextv2_{size}", conv_mlp=False))
    depths, first = CONVNEXTS[size]
    checkpoint = read(f"convnextv2-{size}-in1k", state, "model")
    dims = [first * 2**stage for stage in range(4)]
    check(checkpoint, depths=depths, dims=dims, use_grn=True, input_size=(224, 224))
