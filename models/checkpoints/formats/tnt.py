"""TNT (arXiv 2103.00112, github.com/huawei-noah/Efficient-AI-Backbones).

A flat state dict, or timm's training container. The exponential average is served if there is one,
as upstream reports it; `weights="state_dict"` selects the plain weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.heads import assumed, head_count
from models.checkpoints.families.known import whole
from models.checkpoints.families.ratios import mlp_ratio
from models.checkpoints.families.vit import choose_weights
from models.inputs.transforms import Preprocess
from models.networks import OWN

NAME = "tnt"
OUTER_HEADS = {384: 6, 640: 10}  # of the published sizes
RENAMED = (
    ("outer_pos", "patch_pos"),
    ("inner_pos", "pixel_pos"),
    ("patch_embed", "pixel_embed"),
    ("proj_norm1", "norm1_proj"),
    ("proj_norm2", "norm2_proj"),
    ("inner_norm1", "norm_in"),
    ("inner_attn", "attn_in"),
    ("inner_norm2", "norm_mlp_in"),
    ("inner_mlp", "mlp_in"),
    ("outer_norm1", "norm_out"),
    ("outer_attn", "attn_out"),
    ("outer_norm2", "norm_mlp"),
    ("outer_mlp", "mlp"),
)
UNUSED = "outer_tokens"
HALF = (0.5, 0.5, 0.5)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if {"cls_token", "inner_pos", "blocks.0.inner_attn.qk.weight"} <= keys:
        return "blocks with an inner and an outer attention, and a class token"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights`, `patch_size` (16), `inner_num_heads` (4), `outer_num_heads`
    (as published), `inner_stride` (from the number of words)."""
    default = "state_dict_ema" if "state_dict_ema" in container.sets else container.wrapper
    tensors = choose_weights(container, arguments, default)
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for theirs, ours in RENAMED:
            key = key.replace(theirs, ours)
        if key != UNUSED:
            named[key] = value
    patch = whole("patch_size", arguments.get("patch_size", 16))
    dim = named["cls_token"].shape[-1]
    _, words, inner = named["pixel_pos"].shape
    rows = round(words**0.5)
    table = torch.unflatten(named["pixel_pos"].transpose(1, 2), 2, (rows, rows))
    named["pixel_pos"] = table.contiguous()
    size = round((named["patch_pos"].shape[1] - 1) ** 0.5) * patch
    head = named.get("head.weight")
    outer = head_count(dim, arguments, name="outer_num_heads", published=OUTER_HEADS)
    return Checkpoint(
        format=NAME,
        architecture="tnt",
        library=OWN,
        arguments={
            "img_size": size,
            "patch_size": patch,
            "embed_dim": dim,
            "inner_dim": inner,
            "depth": len({key.split(".")[1] for key in named if key.startswith("blocks.")}),
            "num_heads_inner": whole("inner_num_heads", arguments.get("inner_num_heads", 4)),
            "num_heads_outer": outer,
            "mlp_ratio": mlp_ratio(len(named["blocks.0.mlp.fc1.weight"]), dim),
            "qkv_bias": "blocks.0.attn_out.v.bias" in named,
            "first_stride": whole("inner_stride", arguments.get("inner_stride", -(-patch // rows))),
            "num_classes": 0 if head is None else head.shape[0],
        },
        state_dict=named,
        preprocess=Preprocess(input_size=(size, size), crop_pct=0.9, mean=HALF, std=HALF),
        assumed=assumed(
            arguments,
            outer_num_heads=outer,
            inner_num_heads=4,
            patch_size=16,
            inner_stride=-(-patch // rows),
        ),
        dropped=(UNUSED,) if UNUSED in tensors else (),
    )
