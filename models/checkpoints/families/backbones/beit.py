"""BEiT (arXiv 2106.08254) of its authors, the MAE of BEiT's segmentation code, which TinyMIM and
others share, and both as mmsegmentation has them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.checkpoints.families.backbones import (
    Backbone,
    grid_of,
    head_count,
    norm_eps,
    out_indices,
    sides,
)
from models.checkpoints.families.beit import INDEX, OWN_TABLE, SHARED, split_biases
from models.checkpoints.families.ratios import mlp_ratio
from models.checkpoints.families.segmentors import Table
from models.errors import CheckpointError

TYPES = ("BEiT", "MAE")
LEVELS = ("fpn", "conv1x1.")
LAST_BLOCK = 11  # the one behind which TinyMIM*-T has a further layer


def matches(tensors: Mapping[str, Tensor]) -> bool:
    marks = {"blocks.0.gamma_1", "blocks.0.attn.q_bias", OWN_TABLE, SHARED}
    return "patch_embed.proj.weight" in tensors and bool(marks & tensors.keys())


def convert(tensors: Mapping[str, Tensor], table: Table, by_mmseg: bool) -> Backbone:
    """`table`: `out_indices`, `img_size`, `norm_cfg`; `num_heads` of those without tables of
    relative positions."""
    table.only("patch_norm", False)
    table.only("act_cfg", "GELU")
    table.only("num_fcs", 2)
    distilled = "dist_token" in tensors  # TinyMIM*-T
    prefix = 2 if distilled else 1
    unused = [k for k in tensors if k.endswith(INDEX)]
    if not by_mmseg:  # a norm in authors' files is of pre-training
        unused += [k for k in tensors if k.startswith("norm.")]
    state = {k: v for k, v in tensors.items() if k not in unused and not k.startswith(LEVELS)}
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    relative = state.get(SHARED, state.get(OWN_TABLE))
    if relative is not None:
        heads = relative.shape[1]
        rows, columns = _window(table, relative.shape[0] - 3 * (prefix - 1), patch)
    else:
        heads = head_count(table, dim)
        rows, columns = grid_of(table, state["pos_embed"].shape[1] - prefix, patch)
    layers = out_indices(table, depth, [depth - 1] if by_mmseg else [3, 5, 7, 11])
    if distilled and layers[-1] != LAST_BLOCK:
        raise CheckpointError(
            f"out_indices end with {layers[-1]}; TinyMIM*-T's code reads the last level of block "
            f"{LAST_BLOCK}"
        )
    split_biases(state)
    has_norm = "norm.weight" in state
    if not has_norm:  # only embeddings use it; its values are those that fine-tuning starts from
        state["fc_norm.weight"], state["fc_norm.bias"] = torch.ones(dim), torch.zeros(dim)
    window = (rows * patch, columns * patch)
    return Backbone(
        architecture="distilled-beit" if distilled else "beit",
        arguments={
            "norm_eps": norm_eps(table, 1e-5 if by_mmseg else 1e-6),
            "img_size": list(window),
            "patch_size": patch,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": heads,
            "mlp_ratio": mlp_ratio(len(state["blocks.0.mlp.fc1.weight"]), dim),
            "qkv_bias": "blocks.0.attn.q_bias" in state,
            "init_values": 0.1 if "blocks.0.gamma_1" in state else None,
            "use_abs_pos_emb": "pos_embed" in state,
            "use_rel_pos_bias": OWN_TABLE in state,
            "use_shared_rel_pos_bias": SHARED in state,
            "global_pool": "avg",
            "use_fc_norm": not has_norm,
            "num_classes": 0,
        },
        state_dict=state,
        layers=layers,
        dims=[dim] * len(layers),
        window=window,
        levels={f"levels.{k}": v for k, v in tensors.items() if k.startswith(LEVELS)},
        settings={"patch": patch, "normed": [depth - 1] if has_norm else False},
        dropped=tuple(unused),
    )


def _window(table: Table, rows: int, patch: int) -> tuple[int, int]:
    """The grid whose table of relative positions has that many rows: (2 h - 1) (2 w - 1), and three
    for the class token. By `img_size`, or else of a square.

    Raises:
        CheckpointError: neither fits.
    """
    if (size := sides(table.find("img_size"))) is not None:
        grid = size[0] // patch, size[1] // patch
    else:
        side = round((max(0, rows - 3) ** 0.5 + 1) / 2)
        grid = side, side
    if (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 != rows:
        raise CheckpointError(
            f"the table of relative positions has {rows} rows, which {table.name}.img_size must "
            f"explain; it is {table.find('img_size')}"
        )
    return grid
