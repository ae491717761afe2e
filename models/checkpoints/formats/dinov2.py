"""DINOv2's backbones (arXiv 2304.07193, github.com/facebookresearch/dinov2).

A flat state dict, with or without registers, as published; or the teacher of a training run with
its projection heads and its blocks in chunks.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.dinov2 import dinov2_checkpoint, is_dinov2
from models.checkpoints.families.vit import split_prefix

NAME = "dinov2"

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    tensors = container.tensors
    if "architecture" in arguments or "linear_head.weight" in tensors:
        return None
    if is_dinov2(tensors):
        return "a ViT with layer scale and a mask_token"
    if is_dinov2(split_prefix(tensors, "backbone.")[0]):
        return "a ViT with layer scale and a mask_token under backbone"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    tensors = container.tensors
    if is_dinov2(tensors):
        return dinov2_checkpoint(NAME, tensors, arguments)
    kept, dropped = split_prefix(tensors, "backbone.")
    return dinov2_checkpoint(NAME, kept, arguments, dropped=dropped)
