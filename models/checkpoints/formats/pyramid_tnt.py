"""PyramidTNT (arXiv 2201.00978, github.com/huawei-noah/Efficient-AI-Backbones).

A flat state dict, as released, or timm's training container, of which the exponential average is
served if it has one.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.heads import assumed
from models.checkpoints.families.known import wholes
from models.checkpoints.families.ratios import mlp_ratio
from models.checkpoints.families.vit import choose_weights
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN
from models.reference_outputs import ReferenceRun

NAME = "pyramid-tnt"
# Of the published sizes (Ti, S, M, B), by the first stage's channels.
INNER_HEADS = {80: (1, 2, 4, 4), 128: (2, 4, 8, 8), 192: (2, 4, 8, 8), 256: (2, 4, 8, 8)}
HALF = (0.5, 0.5, 0.5)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if {"word_merges.0.norm.weight", "sentence_merges.0.norm.weight"} <= keys:
        return "word_merges and sentence_merges"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights`, and `configs` with `inner_heads` (as published)."""
    default = "state_dict_ema" if "state_dict_ema" in container.sets else container.wrapper
    tensors = choose_weights(container, arguments, default)
    stages = range(4)
    positions = [tensors[f"stages.{stage}.relative_pos"] for stage in stages]
    first = "stages.{}.blocks.0."
    size = round(tensors["outer_pos"].shape[1] ** 0.5) * 8
    configs = arguments.get("configs", {})
    width = tensors[first.format(0) + "outer_norm1.weight"].shape[0]
    inner = configs.get("inner_heads", INNER_HEADS.get(width))
    if inner is None:
        raise CheckpointError(
            f"the inner heads of stages from {width} channels on are not known; set configs = "
            "{inner_heads = [...]}, such as [1, 2, 4, 4] or [2, 4, 8, 8]"
        )
    outer = [tensors[first.format(s) + "outer_norm1.weight"].shape[0] for s in stages]
    hidden = tensors[first.format(0) + "outer_mlp.fc1.weight"].shape[0]
    blocks = "stages.{}.blocks."
    return Checkpoint(
        format=NAME,
        architecture=NAME,
        library=OWN,
        arguments={
            "img_size": size,
            "depths": [
                len({k.split(".")[3] for k in tensors if k.startswith(blocks.format(s))})
                for s in stages
            ],
            "inner_dims": [
                tensors[first.format(s) + "inner_attn.q.weight"].shape[0] for s in stages
            ],
            "outer_dims": outer,
            "inner_heads": wholes("inner_heads", inner),
            "outer_heads": [table.shape[1] for table in positions],
            "reductions": [round((t.shape[2] / t.shape[3]) ** 0.5) for t in positions],
            "mlp_ratio": mlp_ratio(hidden, outer[0]),
            "qkv_bias": first.format(0) + "outer_attn.q.bias" in tensors,
            "num_classes": tensors["head.weight"].shape[0],
        },
        state_dict=dict(tensors),
        assumed=assumed(configs, inner_heads=list(inner)),
        preprocess=Preprocess(input_size=(size, size), crop_pct=0.9, mean=HALF, std=HALF),
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`tokens`: the feature map's cells row by row, (B, h * w, D)."""
    return {"tokens": run.output.tokens_BTD}
