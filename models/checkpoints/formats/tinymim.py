"""TinyMIM's pre-training (arXiv 2301.01296, github.com/OliverRensu/TinyMIM).

A student in timm's names under `model`; the training script's arguments name its `teacher_model`.
The network is served as the fine-tuning code builds it. Pre-training splits the last block into
another number of heads.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.known import whole
from models.checkpoints.families.mae import outputs as mae_outputs
from models.checkpoints.families.vit import MARKS, vit_checkpoint
from models.reference_outputs import ReferenceRun
from models.trunks.base import Trunk
from models.trunks.features import FeatureRequest

NAME = "tinymim"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if "distillation_type" in container.script:  # DeiT's script
        return None
    if keys >= MARKS and "teacher_model" in container.script:
        return "a ViT in timm's names, by a script that notes its teacher_model"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `finetune_num_heads` or `num_heads` (as published), and `last_heads`, those of
    pre-training's last block (16 for 768 channels, else 12)."""
    config = dict(arguments)
    if "finetune_num_heads" in config:
        config["num_heads"] = config["finetune_num_heads"]
    dim = container.tensors["cls_token"].shape[-1]
    last = whole("last_heads", config.get("last_heads", 16 if dim == 768 else 12))
    return vit_checkpoint(
        NAME,
        container.tensors,
        config,
        positions="bicubic",
        heads={"relations": HeadState({}, {"heads": last})},
        assumed={} if "last_heads" in config else {"last_heads": last},
    )


def request(trunk: Trunk) -> FeatureRequest:
    """The last block's input and output."""
    depth = len(trunk.blocks)
    return FeatureRequest(layers=frozenset({depth - 2, depth - 1}))


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """MAE's outputs, and the relations that pre-training distils, (B, heads, T, T) each."""
    last_input, last = (run.output.layers[number] for number in sorted(run.output.layers))
    number = max(run.output.layers)
    block = run.trunk.blocks[-1]
    heads = run.states["relations"].settings["heads"]
    qkv = block.attn.qkv(block.norm1(last_input))
    split = torch.unflatten(qkv, -1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys, values = split.unbind(0)
    scale = keys.shape[-1] ** -0.5
    only_last = replace(run.output, layers={number: last})
    return mae_outputs(replace(run, output=only_last)) | {
        "relation_qk": (queries @ keys.transpose(-2, -1) * scale).softmax(-1),
        "relation_vv": (values @ values.transpose(-2, -1) * scale).softmax(-1),
    }
