"""Plain ViTs: mmsegmentation's own, and those of iBOT's code (github.com/bytedance/ibot), which
DINO, iBOT and AttMask share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.families.backbones import (
    Backbone,
    grid_of,
    head_count,
    norm_eps,
    out_indices,
)
from models.checkpoints.families.ratios import mlp_ratio
from models.checkpoints.families.segmentors import Table

TYPES = ("VisionTransformer",)
POSITIONS = {"bicubic": "bicubic-by-count", "bilinear": "bilinear-by-count"}


def matches(tensors: Mapping[str, Tensor]) -> bool:
    return {"pos_embed", "cls_token", "patch_embed.proj.weight"} <= tensors.keys() and not (
        {"blocks.0.gamma_1", "blocks.0.attn.q_bias"} & tensors.keys()
        or any("relative_position" in key for key in tensors)
    )


def convert(tensors: Mapping[str, Tensor], table: Table, by_mmseg: bool) -> Backbone:
    """`table`: `num_heads`, `out_indices`, `img_size`, `norm_cfg`; mmsegmentation's also
    `interpolate_mode` (bicubic) and `with_cls_token` (true)."""
    for name in ("patch_norm", "pre_norm", "out_origin"):
        table.only(name, False)
    table.only("patch_pad", "corner")
    table.only("num_fcs", 2)
    table.only("act_cfg", "GELU")
    state = {key: value for key, value in tensors.items() if not key.startswith("fpn")}
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    layers = out_indices(table, depth, [depth - 1] if by_mmseg else [3, 5, 7, 11])
    rows, columns = grid_of(table, state["pos_embed"].shape[1] - 1, patch)
    normed: Any = "norm.weight" in state
    if normed and by_mmseg:  # mmsegmentation's final_norm is applied to the last block alone
        normed = [depth - 1]
    has_class = bool(table.get("with_cls_token", True)) if by_mmseg else True
    if not has_class:  # its position is added and dropped before the first block
        state["pos_embed"] = state["pos_embed"][:, 1:]
    biases = ("patch_embed.proj.bias", *(f"blocks.{n}.attn.proj.bias" for n in range(depth)))
    defaults = dict.fromkeys((*biases, "norm.bias"), torch.zeros(dim))
    defaults["norm.weight"] = torch.ones(dim)  # only embeddings use a norm that is not in the file
    unused = () if has_class else ("cls_token",)
    return Backbone(
        architecture="vit",
        arguments={
            "positions": POSITIONS[str(table.get("interpolate_mode", "bicubic"))]
            if by_mmseg
            else "dino",
            "padding": "corner" if by_mmseg else "",
            "norm_eps": norm_eps(table, 1e-5 if by_mmseg else 1e-6),
            "img_size": [rows * patch, columns * patch],
            "patch_size": patch,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": head_count(table, dim),
            "mlp_ratio": mlp_ratio(len(state["blocks.0.mlp.fc1.weight"]), dim),
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
            "class_token": has_class,
            "global_pool": "token" if has_class else "avg",
            "fc_norm": False,
            "num_classes": 0,
        },
        state_dict={**defaults, **{k: v for k, v in state.items() if k not in unused}},
        layers=layers,
        dims=[dim] * len(layers),
        levels={f"levels.{k}": v for k, v in tensors.items() if k.startswith("fpn")},
        settings={"patch": patch, "normed": normed},
        dropped=unused,
    )
