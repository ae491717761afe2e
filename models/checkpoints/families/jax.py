"""Google's `.npz` JAX ViTs in timm's names (github.com/google-research/vision_transformer)."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from models.errors import CheckpointError
from models.inputs.transforms import Preprocess

HALF = (0.5, 0.5, 0.5)
# vit_jax/input_pipeline.py: TensorFlow's resize, whose antialiasing is off by default, and
# (x - 127.5) / 127.5 of its floats.
PREPROCESS = Preprocess(
    crop_mode="squash",
    crop_pct=1.0,
    interpolation="bilinear",
    antialias=False,
    mean=HALF,
    std=HALF,
)
# Upstream publishes files with the same tensors, SAM's and GSAM's, that were evaluated otherwise.
ASSUMED = {"preprocess": {"crop_mode": "squash", "interpolation": "bilinear"}}
# `resize(SIZE)|value_range(-1, 1)` of github.com/google-research/big_vision, and
# vit_jax/preprocess.py: the resize is cast to uint8.
TRUNCATED = replace(PREPROCESS, truncate=True)
POSITIONS = "Transformer/posembed_input/pos_embedding"
UNIT = re.compile(r"block(\d+)/unit(\d+)/(conv\d|conv_proj|gn\d|gn_proj)/")
BLOCK = "Transformer/encoderblock_"
ATTENTION = "MultiHeadDotProductAttention_1"
# What an encoder has, in old names.
ENCODER = (
    r"encoder_norm/(scale|bias)|encoderblock_\d+/(LayerNorm_[02]/(scale|bias)|"
    r"MlpBlock_3/Dense_[01]/(kernel|bias)|"
    r"MultiHeadDotProductAttention_1/(query|key|value|out)/(kernel|bias))"
)

# Names of newer releases of upstream's code, and of the published files.
LINEN = (
    ("LayerNorm_1/", "LayerNorm_2/"),
    ("MultiHeadDotProductAttention_0/", "MultiHeadDotProductAttention_1/"),
    ("MlpBlock_0/", "MlpBlock_3/"),
)


def in_old_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of the published files, without an optimizer's prefix."""
    named = {}
    for key, value in tensors.items():
        key = key.removeprefix("opt/target/")
        for new, old in LINEN:
            key = key.replace(new, old)
        named[key] = value
    return named


def from_jax(
    tensors: Mapping[str, Tensor], grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """The backbone under timm's names, without classifier and `pre_logits`.

    Kernels (in, out) are transposed; attention kernels have a separate axis for the heads.

    Args:
        grid: (h, w) cells to resize the position table to, as upstream does with scipy's `zoom`.

    Raises:
        CheckpointError: a weight is missing.
    """
    try:
        return _convert(tensors, grid)
    except KeyError as error:
        raise CheckpointError(f"not a complete JAX ViT: the weight {error} is missing") from error


def num_heads(tensors: Mapping[str, Tensor], prefix: str = BLOCK) -> int:
    """The number of heads, which is an axis of the attention kernels."""
    return int(tensors[f"{prefix}0/{ATTENTION}/query/kernel"].shape[1])


def _convert(tensors: Mapping[str, Tensor], grid: tuple[int, int] | None) -> dict[str, Tensor]:
    table = tensors[POSITIONS]
    named = {"cls_token": tensors["cls"]} if "cls" in tensors else {}
    named |= {
        "pos_embed": table if grid is None else resize_corners(table, grid),
        "patch_embed.proj.weight": tensors["embedding/kernel"].permute(3, 2, 0, 1),
        "patch_embed.proj.bias": tensors["embedding/bias"],
        "norm.weight": tensors["Transformer/encoder_norm/scale"],
        "norm.bias": tensors["Transformer/encoder_norm/bias"],
    }
    named |= _resnet(tensors)
    named |= encoder_blocks(tensors, BLOCK)
    return {key: value.contiguous() for key, value in named.items()}


def encoder_blocks(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """An encoder's blocks under timm's names, `blocks.N`.

    Args:
        prefix: what the blocks' names begin with, before their numbers.

    Raises:
        KeyError: a weight is missing.
    """
    named: dict[str, Tensor] = {}
    depth = len({key[len(prefix) :].split("/")[0] for key in tensors if key.startswith(prefix)})
    for number in range(depth):
        block, name = f"{prefix}{number}", f"blocks.{number}"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            named[f"{name}.{ours}.weight"] = tensors[f"{block}/{theirs}/scale"]
            named[f"{name}.{ours}.bias"] = tensors[f"{block}/{theirs}/bias"]
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            named[f"{name}.mlp.{ours}.weight"] = tensors[f"{block}/MlpBlock_3/{theirs}/kernel"].T
            named[f"{name}.mlp.{ours}.bias"] = tensors[f"{block}/MlpBlock_3/{theirs}/bias"]
        attention = f"{block}/{ATTENTION}"
        qkv = attention_inputs(tensors, attention, ("query", "key", "value"))
        named[f"{name}.attn.qkv.weight"], named[f"{name}.attn.qkv.bias"] = qkv
        named[f"{name}.attn.proj.weight"] = tensors[f"{attention}/out/kernel"].flatten(0, 1).T
        named[f"{name}.attn.proj.bias"] = tensors[f"{attention}/out/bias"]
    return named


def attention_inputs(
    tensors: Mapping[str, Tensor], prefix: str, parts: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """One weight and one bias of the parts of an attention: `query`, `key`, `value`.

    Raises:
        CheckpointError: kernels (D, heads, d) and biases (heads, d) differ in heads or channels.
        KeyError: one is missing.
    """
    kernels = [tensors[f"{prefix}/{part}/kernel"] for part in parts]
    biases = [tensors[f"{prefix}/{part}/bias"] for part in parts]
    sizes = {tuple(kernel.shape[1:]) for kernel in kernels}
    sizes |= {tuple(bias.shape) for bias in biases}
    sizes.add(tuple(tensors[f"{prefix}/out/kernel"].shape[:2]))
    if len(sizes) > 1:
        found = " and ".join(map(str, sorted(sizes)))
        raise CheckpointError(f"{prefix}: parts differ in (heads, channels of one): {found}")
    return (
        torch.cat([kernel.flatten(1).T for kernel in kernels]),
        torch.cat([bias.flatten() for bias in biases]),
    )


def resnet_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Arguments of a hybrid's ResNet; None if patches are of pixels."""
    if "conv_root/kernel" not in tensors:
        return None
    stages = {key.split("/")[0] for key in tensors if re.match(r"block\d+/", key)}
    layers = [
        len({key.split("/")[1] for key in tensors if key.startswith(f"block{stage + 1}/")})
        for stage in range(len(stages))
    ]
    return {"layers": layers, "width": tensors["conv_root/kernel"].shape[-1]}


def _resnet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A hybrid's ResNet under `patch_embed.backbone`, its kernels standardised."""
    prefix = "patch_embed.backbone."
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.startswith("conv_root/"):
            layer = "stem.conv"
        elif key.startswith("gn_root/"):
            layer = "stem.norm"
        elif (match := UNIT.match(key)) is not None:
            block, unit, theirs = int(match[1]) - 1, int(match[2]) - 1, match[3]
            ours = {"conv_proj": "downsample.conv", "gn_proj": "downsample.norm"}
            part = ours.get(theirs, theirs.replace("gn", "norm"))
            layer = f"stages.{block}.blocks.{unit}.{part}"
        else:
            continue
        if key.endswith("/kernel"):
            named[f"{prefix}{layer}.weight"] = standardised(value).permute(3, 2, 0, 1)
        else:
            kind = "weight" if key.endswith("/scale") else "bias"
            named[f"{prefix}{layer}.{kind}"] = value.flatten()
    return named


def standardised(kernel: Tensor) -> Tensor:
    """A kernel (h, w, in, out) with mean 0 and deviation 1 for each output channel."""
    kernel = kernel - kernel.mean((0, 1, 2))
    return kernel / (kernel.std((0, 1, 2), correction=0) + 1e-5)


def resize_corners(table_1ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a square table with a class entry to (1, 1 + h * w, D), corners aligned."""
    side = round((table_1ND.shape[1] - 1) ** 0.5)
    if (side, side) == grid:
        return table_1ND
    cells = torch.unflatten(table_1ND[:, 1:], 1, (side, side)).permute(0, 3, 1, 2)
    resized = interpolate(cells, size=grid, mode="bilinear", align_corners=True)
    return torch.cat([table_1ND[:, :1], resized.flatten(2).transpose(1, 2)], 1)
