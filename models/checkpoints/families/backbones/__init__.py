"""Backbones of segmentation, in the names of their authors and of mmsegmentation.

A module has `TYPES`, the configurations' names for its backbones (for errors); `matches(tensors)`;
and `convert(tensors, table, by_mmseg)`. Both get the backbone's tensors without their prefix, those
of transformers under timm's names; `by_mmseg` tells whether they had mmsegmentation's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from models.checkpoints.families.heads import head_count as heads_of_width
from models.checkpoints.families.segmentors import Table
from models.discovery import modules_of
from models.errors import CheckpointError

# mmsegmentation's names of a transformer's parts, and timm's.
RENAMED = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"^stages\.(\d+)\.", r"layers.\1."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.attn\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"\.attn\.w_msa\.", ".attn."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^ln1\.", "norm."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A backbone as a decoder needs it.

    Args:
        architecture, arguments, state_dict: as those of a `Checkpoint`.
        layers: the blocks or stages that the decoder reads.
        dims: their channels.
        window: (height, width) of inputs, if there is only one such size.
        levels: tensors of the decoder's `levels`, which came with the backbone.
        settings: further settings of the head: `patch`, `normed`, `levels_norm_eps`.
        dropped: names that are not used.
    """

    architecture: str
    arguments: Mapping[str, Any]
    state_dict: Mapping[str, Tensor]
    layers: Sequence[int]
    dims: Sequence[int]
    window: tuple[int, int] | None = None
    levels: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


def convert_backbone(tensors: Mapping[str, Tensor], table: Table) -> Backbone:
    """The backbone of these tensors.

    Args:
        tensors: without the prefix `backbone.`.
        table: the configuration of the backbone.

    Raises:
        CheckpointError: no such backbone, or it is not complete.
    """
    named = in_timms_names(tensors)
    families: list[Any] = [module for module in modules_of(__name__) if hasattr(module, "TYPES")]
    for family in families:
        if family.matches(named):
            backbone: Backbone = family.convert(named, table, named.keys() != tensors.keys())
            return backbone
    known = ", ".join(name for family in families for name in family.TYPES)
    raise CheckpointError(
        f"no backbone {table.type or 'with tensors named ' + ', '.join(list(tensors)[:5])}; "
        f"supported: {known}"
    )


def in_timms_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a transformer in mmsegmentation's names under timm's; others unchanged."""
    if not any(".w_msa." in key or ".ln1." in key for key in tensors):
        return dict(tensors)
    named = {}
    for key, value in tensors.items():
        for theirs, ours in RENAMED:
            key = re.sub(theirs, ours, key)
        named[key] = value
    return named


def out_indices(table: Table, depth: int, default: Sequence[int]) -> list[int]:
    """The blocks that a decoder on a plain ViT reads, counted from 0.

    Args:
        default: those of the backbone's code.

    Raises:
        CheckpointError: the configuration does not say them, or there are no such blocks.
    """
    usual = "[3, 5, 7, 11] or [2, 5, 8, 11] of 12 blocks, [7, 11, 15, 23] of 24"
    value = table.require("out_indices", usual, list(default))
    numbers = [int(value)] if isinstance(value, int) else [int(n) for n in value]
    if not numbers or any(not -depth <= n < depth for n in numbers):
        raise CheckpointError(f"{table.name}.out_indices are {numbers}; there are {depth} blocks")
    return [n % depth for n in numbers]


def norm_eps(table: Table, of_code: float) -> float:
    """The epsilon of the layer norms: `norm_cfg.eps`; the code's default for a table with a type,
    else 1e-6, which is assumed."""
    config = table.find("norm_cfg")
    if isinstance(config, Mapping) and config.get("eps") is not None:
        return float(config["eps"])
    if "type" in table.values:
        return of_code
    table.assumed[f"{table.name}.norm_cfg.eps"] = 1e-6
    return 1e-6


def sides(value: Any) -> tuple[int, int] | None:
    """(height, width) of a side or both; None for anything else."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        return int(value[0]), int(value[-1])
    return None


def grid_of(table: Table, cells: int, patch: int, name: str = "img_size") -> tuple[int, int]:
    """Rows and columns of a table of `cells` positions: by the size called `name`, or else of a
    square.

    Raises:
        CheckpointError: neither fits.
    """
    if (size := sides(table.find(name))) is not None:
        rows, columns = size[0] // patch, size[1] // patch
    else:
        rows = columns = round(max(cells, 0) ** 0.5)
    if cells < 1 or rows * columns != cells:
        raise CheckpointError(
            f"the positions are of {cells} patches, which {table.name}.{name} must say; it is "
            f"{table.find(name)}"
        )
    return rows, columns


def head_count(table: Table, dim: int) -> int:
    """`num_heads`: 12 where a table with a type leaves it out, as in its code; that of published
    networks, which is assumed, without a type.

    Raises:
        CheckpointError: it is not known, or does not divide the channels.
    """
    values = {"num_heads": 12, **table.values} if "type" in table.values else table.values
    heads = heads_of_width(dim, values)
    if "num_heads" not in values:
        table.assumed[f"{table.name}.num_heads"] = heads
    return heads
