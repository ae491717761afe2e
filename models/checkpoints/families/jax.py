"""Google's `.npz` files of JAX ViTs (google-research/vision_transformer) in timm's names."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from models.errors import CheckpointError

POSITIONS = "Transformer/posembed_input/pos_embedding"
BLOCK = "Transformer/encoderblock_"
ATTENTION = "MultiHeadDotProductAttention_1"


# What newer releases of upstream's code call its parts.
LINEN = (
    ("LayerNorm_1/", "LayerNorm_2/"),
    ("MultiHeadDotProductAttention_0/", "MultiHeadDotProductAttention_1/"),
    ("MlpBlock_0/", "MlpBlock_3/"),
)


def in_old_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that published files have; optimizers' prefix is stripped."""
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
    """The backbone under timm's names; classifier and `pre_logits` are left out.

    Kernels (in, out) are transposed; those of attention have an axis for the heads. The table of
    positions is resized to `grid`, if given, linearly, corners to corners, as upstream does with
    scipy's zoom.

    Raises:
        CheckpointError: a weight is missing.
    """
    try:
        return _convert(tensors, grid)
    except KeyError as error:
        raise CheckpointError(f"not a whole ViT of JAX: the weight {error} is missing") from error


def num_heads(tensors: Mapping[str, Tensor]) -> int:
    """Heads, which JAX keeps as an axis."""
    return int(tensors[f"{BLOCK}0/{ATTENTION}/query/kernel"].shape[1])


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
    depth = len({key.split("/")[1] for key in tensors if key.startswith(BLOCK)})
    for number in range(depth):
        block, name = f"{BLOCK}{number}", f"blocks.{number}"
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            named[f"{name}.{ours}.weight"] = tensors[f"{block}/{theirs}/scale"]
            named[f"{name}.{ours}.bias"] = tensors[f"{block}/{theirs}/bias"]
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            named[f"{name}.mlp.{ours}.weight"] = tensors[f"{block}/MlpBlock_3/{theirs}/kernel"].T
            named[f"{name}.mlp.{ours}.bias"] = tensors[f"{block}/MlpBlock_3/{theirs}/bias"]
        attention = f"{block}/{ATTENTION}"
        parts = ("query", "key", "value")
        kernels = [tensors[f"{attention}/{part}/kernel"].flatten(1).T for part in parts]
        named[f"{name}.attn.qkv.weight"] = torch.cat(kernels)
        biases = [tensors[f"{attention}/{part}/bias"].flatten() for part in parts]
        named[f"{name}.attn.qkv.bias"] = torch.cat(biases)
        named[f"{name}.attn.proj.weight"] = tensors[f"{attention}/out/kernel"].flatten(0, 1).T
        named[f"{name}.attn.proj.bias"] = tensors[f"{attention}/out/bias"]
    return {key: value.contiguous() for key, value in named.items()}


def resize_corners(table_1ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, 1 + h * w, D): a square table with a class entry, its corners kept at the corners."""
    side = round((table_1ND.shape[1] - 1) ** 0.5)
    if (side, side) == grid:
        return table_1ND
    cells = torch.unflatten(table_1ND[:, 1:], 1, (side, side)).permute(0, 3, 1, 2)
    resized = interpolate(cells, size=grid, mode="bilinear", align_corners=True)
    return torch.cat([table_1ND[:, :1], resized.flatten(2).transpose(1, 2)], 1)
