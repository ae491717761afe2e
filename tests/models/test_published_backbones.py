"""More of the catalog `published` at full size: backbones that self-supervised methods train.

As in `test_published_sizes.py`, references are timm's networks, under their authors' names for the
weights and in their authors' containers, and nothing has memory.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.models.published import State, check, from_timm, meta, on_meta, read, with_values
from tests.models.test_published_sizes import VITS

__all__ = ["with_values"]

SWINS = {"tiny": ([2, 2, 6, 2], [3, 6, 12, 24]), "small": ([2, 2, 18, 2], [3, 6, 12, 24]),
         "base": ([2, 2, 18, 2], [4, 8, 16, 32])}  # fmt: skip
HEADS = {"head.last_layer.weight_v": (4, 4)}
TWO_HEADS = {**HEADS, "head.last_layer2.weight_v": (4, 4)}


def zeros(shapes: Mapping[str, tuple[int, ...]]) -> State:
    return meta(**shapes)


def two_networks(state: State) -> dict[str, Any]:
    """What a training run with a student and a teacher writes."""
    return {"wrapper": "teacher", "sets": {"student": dict(state), "teacher": dict(state)}}


def swin(size: str, window: int, input_size: int = 224) -> State:
    """timm's Swin under the authors' names: patch merging ends a stage."""
    state = from_timm(f"swin_{size}_patch4_window7_224", window_size=window, img_size=input_size,
                      norm_layer=partial(nn.LayerNorm, eps=1e-6), num_classes=0)  # fmt: skip

    def theirs(match: re.Match[str]) -> str:
        return f"layers.{int(match[1]) - 1}.downsample"

    return {re.sub(r"^layers\.(\d)\.downsample", theirs, k): v for k, v in state.items()}


def vit(size: str, **options: Any) -> State:
    return from_timm(f"{VITS[size][0]}_patch16_224", **{"num_classes": 0, **options})


@pytest.mark.parametrize("size", ["vits", "vitb", "vitl"])
def test_ibot(size: str) -> None:
    checkpoint = read(f"ibot-{size}16", vit(size), "state_dict")
    check(checkpoint, num_heads=VITS[size][1], patch_size=16, input_size=(224, 224))


def test_ibots_student_has_an_embedding_of_masked_patches() -> None:
    state = vit("vitb") | zeros({"masked_embed": (1, 768)})
    check(read("ibot-vitb16-22k", state, "state_dict"), num_heads=12)


@pytest.mark.parametrize(
    ("entry", "heads", "size"),
    [
        ("dino-vits16-full", HEADS, "vits"),
        ("attmask-high-300", TWO_HEADS, "vits"),
    ],
)
def test_whole_runs_of_dino_and_attmask(
    entry: str, heads: dict[str, tuple[int, ...]], size: str
) -> None:
    state = {f"backbone.{key}": value for key, value in vit(size).items()} | zeros(heads)
    checkpoint = read(entry, state, **two_networks(state))
    check(checkpoint, num_heads=VITS[size][1], input_size=(224, 224))


@pytest.mark.parametrize(
    ("entry", "size", "window"),
    [
        ("esvit-swin-tiny-w7", "tiny", 7),
        ("esvit-swin-small-w7", "small", 7),
        ("esvit-swin-base-w7", "base", 7),
        ("esvit-swin-tiny-w14", "tiny", 14),
        ("ibot-swint7", "tiny", 7),
    ],
)
def test_whole_runs_with_swins(entry: str, size: str, window: int) -> None:
    """A window of 14 does not fit the last stage's map of 7, and is as large as that there."""
    state = swin(size, window)
    if entry.startswith("ibot"):
        state = {f"backbone.{key}": value for key, value in state.items()} | zeros(TWO_HEADS)
    else:
        state |= zeros(HEADS)
    checkpoint = read(entry, state, **two_networks(state))
    depths, heads = SWINS[size]
    check(checkpoint, depths=depths, num_heads=heads, window_size=window, input_size=(224, 224))


def decoder(dim: int, cells: int, patch: int) -> State:
    """MAE's decoder: eight blocks of 512 channels."""
    network = on_meta(
        lambda: VisionTransformer(embed_dim=512, depth=8, num_heads=16, num_classes=0)
    )
    state = {f"decoder_{k}": v for k, v in network.items() if k.startswith("blocks.")}
    pixels = 3 * patch**2
    return state | zeros(
        {
            "mask_token": (1, 1, 512), "decoder_pos_embed": (1, 1 + cells, 512),
            "decoder_norm.weight": (512,), "decoder_norm.bias": (512,),
            "decoder_embed.weight": (512, dim), "decoder_embed.bias": (512,),
            "decoder_pred.weight": (pixels, 512), "decoder_pred.bias": (pixels,),
        }
    )  # fmt: skip


@pytest.mark.parametrize(("size", "heads"), [("base", 12), ("large", 16), ("huge", 16)])
def test_maes_with_their_decoders(size: str, heads: int) -> None:
    patch = 14 if size == "huge" else 16
    encoder = from_timm(f"vit_{size}_patch{patch}_224", num_classes=0)
    state = encoder | decoder(encoder["norm.weight"].shape[0], (224 // patch) ** 2, patch)
    checkpoint = read(f"mae-vit-{size}-draws", state, "model")
    check(checkpoint, num_heads=heads, patch_size=patch)
    assert checkpoint.heads["decoder"].settings["num_heads"] == 16
    assert checkpoint.assumed["decoder_num_heads"] == 16


def test_mocos_classifiers() -> None:
    for size in ("vits", "vitb"):
        beside = {"arch": "vit", "best_acc1": None, "epoch": 3}
        state = vit(size, num_classes=1000, num_heads=12)
        entry = f"mocov3-{size}-linear"
        checkpoint = read(entry, state, "state_dict", beside=beside)
        check(checkpoint, num_heads=12, num_classes=1000, input_size=(224, 224))


def test_tinymim_scale_mae_and_supmae() -> None:
    beside = {"args": {"teacher_model": "mae_vit_large"}}
    check(read("tinymim-vitb", vit("vitb"), "model", beside=beside), num_heads=12)
    pyramid = zeros({"fpn.fpn2.0.weight": (512, 512, 2, 2)})
    found = read("scalemae-vitl", vit("vitl") | pyramid, "model")
    assert (found.arguments["num_heads"], found.arguments["depth"]) == (16, 24)
    tuned = vit("vitb", num_classes=1000, global_pool="avg")
    check(read("supmae-vitb-in1k", tuned, "model"), num_heads=12, num_classes=1000)


@pytest.mark.parametrize(("size", "heads"), [("base", 12), ("large", 16)])
def test_beits_of_pre_training_share_a_table(size: str, heads: int) -> None:
    state = from_timm(f"beit_{size}_patch16_224", use_shared_rel_pos_bias=True,
                      use_rel_pos_bias=False, num_classes=0, global_pool="token")  # fmt: skip
    dim = state["norm.weight"].shape[0]
    codes = zeros({"mask_token": (1, 1, dim), "lm_head.weight": (8192, dim),
                   "lm_head.bias": (8192,)})  # fmt: skip
    check(read(f"beit-{size}", state | codes, "model"), num_heads=heads, input_size=(224, 224))


@pytest.mark.parametrize(
    ("entry", "name", "heads", "classes"),
    [
        ("augreg-b16-21k", "vit_base_patch16_224", 12, 21843),
        ("augreg-s16-21k", "vit_small_patch16_224", 6, 21843),
        ("vit-b16-in1k", "vit_base_patch16_384", 12, 1000),
    ],
)
def test_jaxs_vits(entry: str, name: str, heads: int, classes: int) -> None:
    """Heads are an axis of attention's kernels."""
    state: State = {}
    for key, value in from_timm(name, num_classes=classes, act_layer="gelu_tanh").items():
        theirs = in_jax_names(key, value, heads)
        state |= theirs
    checkpoint = read(entry, state)
    side = int(name[-3:])
    check(checkpoint, num_heads=heads, num_classes=classes, input_size=(side, side))
    assert checkpoint.arguments["act_layer"] == "gelu_tanh"


PLAIN = {"cls_token": "cls", "pos_embed": "Transformer/posembed_input/pos_embedding",
         "patch_embed.proj.weight": "embedding/kernel", "patch_embed.proj.bias": "embedding/bias",
         "norm.weight": "Transformer/encoder_norm/scale",
         "norm.bias": "Transformer/encoder_norm/bias",
         "head.weight": "head/kernel", "head.bias": "head/bias"}  # fmt: skip
PARTS = {"norm1.weight": "LayerNorm_0/scale", "norm1.bias": "LayerNorm_0/bias",
         "norm2.weight": "LayerNorm_2/scale", "norm2.bias": "LayerNorm_2/bias",
         "mlp.fc1.weight": "MlpBlock_3/Dense_0/kernel", "mlp.fc1.bias": "MlpBlock_3/Dense_0/bias",
         "mlp.fc2.weight": "MlpBlock_3/Dense_1/kernel",
         "mlp.fc2.bias": "MlpBlock_3/Dense_1/bias"}  # fmt: skip


def in_jax_names(key: str, value: torch.Tensor, heads: int) -> State:
    """A timm ViT's tensor as JAX's ViTs store it."""
    if key in PLAIN:
        kernel = value.permute(2, 3, 1, 0) if value.dim() == 4 else value
        return {PLAIN[key]: value.T if key == "head.weight" else kernel}
    _, number, part = key.split(".", 2)
    block = f"Transformer/encoderblock_{number}"
    if part in PARTS:
        return {f"{block}/{PARTS[part]}": value.T if value.dim() == 2 else value}
    attention = f"{block}/MultiHeadDotProductAttention_1"
    names = ("query", "key", "value")
    match part:
        case "attn.qkv.weight":
            kernels = (rows.T.reshape(len(rows.T), heads, -1) for rows in value.chunk(3))
            return {f"{attention}/{n}/kernel": k for n, k in zip(names, kernels, strict=True)}
        case "attn.qkv.bias":
            biases = (rows.reshape(heads, -1) for rows in value.chunk(3))
            return {f"{attention}/{n}/bias": b for n, b in zip(names, biases, strict=True)}
        case "attn.proj.weight":
            return {f"{attention}/out/kernel": value.T.reshape(heads, -1, len(value))}
    return {f"{attention}/out/bias": value}
