"""Further entries of the catalog `published` at full size, see `test_published_sizes.py`."""

import re
from typing import Any

import pytest
from torch import nn

from models.networks import create_own
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
from tests.models.test_published_sizes import CONVNEXTS

__all__ = ["with_values"]

BASE = "vit_base_patch16_224"


def vit(name: str = BASE, **options: Any) -> State:
    return from_timm(name, **{"num_classes": 0, **options})


# -- self-supervised ---------------------------------------------------------------------------


def drawing_head() -> nn.Module:
    """SiT's, which reconstructs the image."""
    mlp = (nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 384))
    cells = nn.ConvTranspose2d(384, 3, 16, stride=16)
    return nn.ModuleDict({"mlp": nn.Sequential(*mlp), "convTrans": cells})


def test_sit() -> None:
    """The teacher of a whole checkpoint."""
    state = below("backbone.", vit("vit_small_patch16_224"))
    state |= below("head_recons.", on_meta(drawing_head))
    checkpoint = read("sit-vits16", state, "teacher", sets={"student": state, "teacher": state})
    assert checkpoint.format == "sit"
    check(checkpoint, num_heads=6, patch_size=16, input_size=(224, 224))


# -- masked image modelling --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "format_name"), [("supmae-vitb-in1k", "mae-finetuned"), ("ggem-vitb16", "ggem")]
)
def test_classifiers_in_timms_names(entry: str, format_name: str) -> None:
    """SupMAE's, and GGeM's of a training run of one's own, which has a parameter more."""
    state = vit(num_classes=1000, global_pool="avg" if "supmae" in entry else "token")
    if format_name == "ggem":
        state |= meta(ggem__p=(12,))
    checkpoint = read(entry, state, "model")
    assert checkpoint.format == format_name
    check(checkpoint, num_heads=12, num_classes=1000, input_size=(224, 224))


def test_peco() -> None:
    state = from_timm(
        "beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False,
        num_classes=0, global_pool="token",
    )  # fmt: skip
    state |= meta(mask_token=(1, 1, 768), lm_head__weight=(8192, 768), lm_head__bias=(8192,))
    checkpoint = read("peco-base", state, "model")
    assert checkpoint.format == "beit"
    check(
        checkpoint, num_heads=12, use_shared_rel_pos_bias=True, use_rel_pos_bias=False,
        input_size=(224, 224), mean=(0.5, 0.5, 0.5),
    )  # fmt: skip


@pytest.mark.parametrize("size", CONVNEXTS)
def test_convnext_v2s_pre_training(size: str) -> None:
    """Sparse kernels, without a norm and a classifier; the decoder is left out of account."""
    state = in_convnexts_names(from_timm(f"convnextv2_{size}", conv_mlp=False, num_classes=0))
    sparse: State = {}
    for key, value in state.items():
        if key.startswith("norm."):
            continue
        name = re.sub(r"\.norm\.", ".norm.ln.", re.sub(r"(pwconv\d)\.", r"\1.linear.", key))
        if key.endswith("dwconv.weight"):
            name, value = key.replace("weight", "kernel"), value[:, 0].mT.flatten(1).T
        elif key.endswith("dwconv.bias"):
            value = value[None]
        sparse[f"encoder.{name}"] = value[0, 0] if ".grn." in key else value
    sparse |= meta(proj__weight=(512, 8, 1, 1), mask_token=(1, 512, 1, 1))
    depths, first = CONVNEXTS[size]
    if BUILDING.reference is not None:  # upstream's fine-tuning begins with a norm's initial values
        BUILDING.reference.head.norm.reset_parameters()
    checkpoint = read(f"convnextv2-{size}-fcmae", sparse, "model")
    assert checkpoint.format == "convnext-v2"
    check(checkpoint, depths=depths, dims=[first * 2**stage for stage in range(4)], use_grn=True,
          input_size=(224, 224))  # fmt: skip


# -- classifiers -------------------------------------------------------------------------------

COLUMNS = {"s60-224-1k": (384, 60, 1), "s120-224-1k": (384, 120, 1), "b60-224-1k": (768, 60, 1),
           "b120-224-1k": (768, 120, 1), "s60-multi-scratch-1k": (384, 60, 1000),
           "s60-multi-finetune-1k": (384, 60, 1000)}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_patchconvnet(name: str) -> None:
    """Of sixty or a hundred and twenty columns, with one class token or one a class."""
    dim, depth, tokens = COLUMNS[name]
    state = on_meta(
        lambda: create_own(
            "patchconvnet", embed_dim=dim, depth=depth, depth_token_only=1, num_heads=1,
            mlp_ratio=3.0, num_classes=1000, class_tokens=tokens,
        )
    )  # fmt: skip
    checkpoint = read(f"patchconvnet-{name}", state, "model")
    check(checkpoint, num_heads=1, class_tokens=tokens, num_classes=1000, input_size=(224, 224))


@pytest.mark.parametrize(("size", "heads"), [("s", 6), ("b", 10)])
def test_tnt(size: str, heads: int) -> None:
    """By timm's networks: 16 words of 4 pixels a patch."""
    from models.checkpoints.formats.tnt import RENAMED

    state = from_timm(f"tnt_{size}_patch16_224")
    named: State = {}
    for key, value in state.items():
        if key == "pixel_pos":
            value = value.flatten(2).transpose(1, 2)
        for theirs, ours in reversed(RENAMED):
            part = re.compile(rf"(^|\.){ours}(?=\.|$)")
            key = part.sub(rf"\g<1>{theirs}", key)
        named[key] = value
    checkpoint = read(f"tnt-{size}", named, "")
    check(
        checkpoint, num_heads_outer=heads, num_heads_inner=4, first_stride=4, patch_size=16,
        input_size=(224, 224), crop_pct=0.9, mean=(0.5, 0.5, 0.5),
    )  # fmt: skip


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_small_scale_vits(dataset: str) -> None:
    """ViTs of nine blocks with heads of 16 channels, for images of 32 pixels."""
    classes = int(dataset.removeprefix("cifar"))
    state = on_meta(
        lambda: create_own(
            "vit", positions="dino", img_size=32, patch_size=4, embed_dim=192, depth=9,
            num_heads=12, mlp_ratio=2.0, num_classes=classes,
        )
    )  # fmt: skip
    checkpoint = read(f"small-vit-{dataset}", state, "model_state_dict")
    assert checkpoint.format == "small-scale-vits-finetuned"
    check(checkpoint, num_heads=12, patch_size=4, num_classes=classes, input_size=(32, 32))
