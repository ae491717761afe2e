"""Further entries of the catalog `published` at full size, see `test_published_sizes.py`."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.networks import create_own
from tests.models.test_published_sizes import (
    CONVNEXTS,
    VITS,
    State,
    check,
    from_timm,
    on_meta,
    read,
)

BASE = "vit_base_patch16_224"


def vit(name: str = BASE, **options: Any) -> State:
    return from_timm(name, **{"num_classes": 0, **options})


def below(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def meta(**shapes: tuple[int, ...]) -> State:
    """Tensors by name, with `__` for dots."""
    return {k.replace("__", "."): torch.zeros(v, device="meta") for k, v in shapes.items()}


def projection(*names: str) -> State:
    """What marks the projection heads of self-supervised training."""
    return meta(**{f"{name}__last_layer__weight_v": (1, 1) for name in names})


# -- self-supervised ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "size"),
    [("vits16", "vits"), ("vitb16", "vitb"), ("vitl16", "vitl"), ("vitb16-22k", "vitb")],
)
def test_ibot(entry: str, size: str) -> None:
    name, heads = VITS[size]
    checkpoint = read(f"ibot-{entry}", vit(f"{name}_patch16_224"), "state_dict")
    assert checkpoint.format == "ibot-backbone"
    check(checkpoint, num_heads=heads, patch_size=16, positions="dino", input_size=(224, 224))


def drawing_head() -> nn.Module:
    """SiT's, which reconstructs the image."""
    mlp = (nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 384))
    cells = nn.ConvTranspose2d(384, 3, 16, stride=16)
    return nn.ModuleDict({"mlp": nn.Sequential(*mlp), "convTrans": cells})


@pytest.mark.parametrize(
    ("entry", "method"),
    [("dino-vits16-full", "dino"), ("attmask-high-300", "ibot"), ("sit-vits16", "sit")],
)
def test_training_runs_of_vits(entry: str, method: str) -> None:
    """The teacher of a whole checkpoint; AttMask is iBOT's training."""
    state = below("backbone.", vit("vit_small_patch16_224"))
    match method:
        case "sit":
            state |= below("head_recons.", on_meta(drawing_head))
        case "ibot":
            state |= projection("head") | meta(head__last_layer2__weight_v=(1, 1))
        case _:
            state |= projection("head")
    sets = {"student": state, "teacher": state}
    checkpoint = read(entry, state, "teacher", sets=sets)
    assert checkpoint.format == method
    check(checkpoint, num_heads=6, patch_size=16, input_size=(224, 224))


SWINS = {"tiny-w7": ([2, 2, 6, 2], [3, 6, 12, 24], 7),
         "small-w7": ([2, 2, 18, 2], [3, 6, 12, 24], 7),
         "base-w7": ([2, 2, 18, 2], [4, 8, 16, 32], 7),
         "tiny-w14": ([2, 2, 6, 2], [3, 6, 12, 24], 14)}  # fmt: skip


def swin(size: str) -> State:
    """By timm's networks; patch merging ends a stage in upstream's names."""
    depths, heads, window = SWINS[size]
    state = on_meta(
        lambda: create_own(
            "swin", img_size=224, embed_dim=32 * heads[0], depths=depths, num_heads=heads,
            window_size=window, num_classes=0,
        )
    )  # fmt: skip
    named = {}
    for key, value in state.items():
        key = re.sub(
            r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
        )
        named[key] = value
    return named


@pytest.mark.parametrize("size", SWINS)
def test_esvit(size: str) -> None:
    depths, heads, window = SWINS[size]
    state = swin(size) | projection("head", "head_dense")
    sets = {"student": state, "teacher": state}
    checkpoint = read(f"esvit-swin-{size}", state, "teacher", sets=sets)
    assert checkpoint.format == "esvit"
    check(
        checkpoint, depths=depths, num_heads=heads, window_size=window, patch_size=4,
        input_size=(224, 224),
    )  # fmt: skip


def test_ibots_swin() -> None:
    state = below("backbone.", swin("tiny-w7")) | projection("head")
    state |= meta(head__last_layer2__weight_v=(1, 1))
    checkpoint = read("ibot-swint7", state, "teacher", sets={"student": state, "teacher": state})
    check(checkpoint, num_heads=[3, 6, 12, 24], window_size=7, input_size=(224, 224))


@pytest.mark.parametrize("size", ["s", "b"])
def test_moco_v3_linear(size: str) -> None:
    name = {"s": "vit_small", "b": "vit_base"}[size]
    state = vit(f"{name}_patch16_224", num_classes=1000)
    beside = {"arch": f"vit_{name}", "best_acc1": None, "epoch": 90}
    checkpoint = read(f"mocov3-vit{size}-linear", state, "state_dict", beside=beside)
    assert checkpoint.format == "moco-v3-linear"
    check(checkpoint, num_heads=12, num_classes=1000, input_size=(224, 224), crop_pct=0.875)


# -- masked image modelling --------------------------------------------------------------------

MAES = {"base": (768, 12, 16), "large": (1024, 16, 16), "huge": (1280, 16, 14)}


def decoder(dim: int, cells: int, patch: int, *, width: int = 512, depth: int = 8) -> State:
    """MAE's decoder."""
    blocks = on_meta(lambda: nn.ModuleList(Block(width, 16, qkv_bias=True) for _ in range(depth)))
    return below("decoder_blocks.", blocks) | meta(
        mask_token=(1, 1, width), decoder_pos_embed=(1, 1 + cells, width),
        decoder_embed__weight=(width, dim), decoder_embed__bias=(width,),
        decoder_norm__weight=(width,), decoder_norm__bias=(width,),
        decoder_pred__weight=(3 * patch**2, width), decoder_pred__bias=(3 * patch**2,),
    )  # fmt: skip


@pytest.mark.parametrize("size", MAES)
def test_mae_that_draws(size: str) -> None:
    dim, heads, patch = MAES[size]
    state = vit(f"vit_{size}_patch{patch}_224") | decoder(dim, (224 // patch) ** 2, patch)
    checkpoint = read(f"mae-vit-{size}-draws", state, "model")
    assert checkpoint.format == "mae"
    check(checkpoint, num_heads=heads, patch_size=patch)
    assert checkpoint.heads["decoder"].settings["num_heads"] == 16


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


@pytest.mark.parametrize(
    ("entry", "size"), [("beit-base", "base"), ("beit-large", "large"), ("peco-base", "base")]
)
def test_beits_pre_training(entry: str, size: str) -> None:
    dim, heads, _ = MAES[size]
    state = from_timm(f"beit_{size}_patch16_224", num_classes=0)
    tables = [key for key in state if key.endswith("relative_position_bias_table")]
    shared = state[tables[0]]
    state = {key: value for key, value in state.items() if "relative_position" not in key}
    state = {k.replace("fc_norm.", "norm."): v for k, v in state.items()}
    state |= meta(
        rel_pos_bias__relative_position_bias_table=tuple(shared.shape), mask_token=(1, 1, dim),
        lm_head__weight=(8192, dim), lm_head__bias=(8192,),
    )  # fmt: skip
    checkpoint = read(entry, state, "model")
    assert checkpoint.format == "beit"
    check(
        checkpoint, num_heads=heads, use_shared_rel_pos_bias=True, use_rel_pos_bias=False,
        input_size=(224, 224), mean=(0.5, 0.5, 0.5),
    )  # fmt: skip


@pytest.mark.parametrize("size", CONVNEXTS)
def test_convnext_v2s_pre_training(size: str) -> None:
    """Sparse kernels, without a classifier and with the decoder left out of account."""
    depths, first = CONVNEXTS[size]
    shapes: dict[str, tuple[int, ...]] = {}
    for stage, depth in enumerate(depths):
        dim = first * 2**stage
        before = 3 if stage == 0 else dim // 2
        kernel, norm = (4, dim) if stage == 0 else (2, before)
        conv, place = (0, 1) if stage == 0 else (1, 0)
        down = f"encoder__downsample_layers__{stage}__"
        shapes |= {
            f"{down}{conv}__weight": (dim, before, kernel, kernel), f"{down}{conv}__bias": (dim,),
            f"{down}{place}__weight": (norm,), f"{down}{place}__bias": (norm,),
        }  # fmt: skip
        for number in range(depth):
            block = f"encoder__stages__{stage}__{number}__"
            shapes |= {
                f"{block}dwconv__kernel": (49, dim), f"{block}dwconv__bias": (1, dim),
                f"{block}norm__ln__weight": (dim,), f"{block}norm__ln__bias": (dim,),
                f"{block}pwconv1__linear__weight": (4 * dim, dim),
                f"{block}pwconv1__linear__bias": (4 * dim,),
                f"{block}grn__gamma": (1, 4 * dim), f"{block}grn__beta": (1, 4 * dim),
                f"{block}pwconv2__linear__weight": (dim, 4 * dim),
                f"{block}pwconv2__linear__bias": (dim,),
            }  # fmt: skip
    shapes |= {"proj__weight": (512, 8 * first, 1, 1), "mask_token": (1, 512, 1, 1)}
    checkpoint = read(f"convnextv2-{size}-fcmae", meta(**shapes), "model")
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


# -- JAX's -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "dim", "heads", "hidden", "classes"),
    [("augreg-b16-21k", 768, 12, 768, 21843), ("augreg-s16-21k", 384, 6, None, 21843),
     ("vit-b16-in1k", 768, 12, None, 1000)],
)  # fmt: skip
def test_augreg(entry: str, dim: int, heads: int, hidden: int | None, classes: int) -> None:
    size = 384 if entry == "vit-b16-in1k" else 224
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, dim), "embedding/kernel": (16, 16, 3, dim), "embedding/bias": (dim,),
        "Transformer/posembed_input/pos_embedding": (1, 1 + (size // 16) ** 2, dim),
        "Transformer/encoder_norm/scale": (dim,), "Transformer/encoder_norm/bias": (dim,),
        "head/kernel": (hidden or dim, classes), "head/bias": (classes,),
    }  # fmt: skip
    if hidden:
        shapes |= {"pre_logits/kernel": (dim, hidden), "pre_logits/bias": (hidden,)}
    for number in range(12):
        block = f"Transformer/encoderblock_{number}/"
        attention = f"{block}MultiHeadDotProductAttention_1/"
        for part in ("query", "key", "value"):
            shapes[f"{attention}{part}/kernel"] = (dim, heads, dim // heads)
            shapes[f"{attention}{part}/bias"] = (heads, dim // heads)
        shapes |= {f"{attention}out/kernel": (heads, dim // heads, dim),
                   f"{attention}out/bias": (dim,)}  # fmt: skip
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}{norm}/scale": (dim,), f"{block}{norm}/bias": (dim,)}
        shapes |= {
            f"{block}MlpBlock_3/Dense_0/kernel": (dim, 4 * dim),
            f"{block}MlpBlock_3/Dense_0/bias": (4 * dim,),
            f"{block}MlpBlock_3/Dense_1/kernel": (4 * dim, dim),
            f"{block}MlpBlock_3/Dense_1/bias": (dim,),
        }  # fmt: skip
    checkpoint = read(entry, {k: torch.zeros(v, device="meta") for k, v in shapes.items()})
    check(checkpoint, num_heads=heads, patch_size=16, input_size=(size, size), crop_pct=1.0)
    assert checkpoint.preprocess is not None
    assert not checkpoint.preprocess.antialias
    assert not checkpoint.preprocess.truncate
