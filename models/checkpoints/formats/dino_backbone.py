"""DINO's published backbones (arXiv 2104.14294, github.com/facebookresearch/dino).

A flat state dict of a ViT in timm's names.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.vit import MARKS, vit_checkpoint

NAME = "dino-backbone"
KEPT = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm.")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if container.wrapper or container.metadata or "architecture" in arguments:
        return None
    if keys >= MARKS and all(key.startswith(KEPT) for key in keys):
        return "a flat state dict of a ViT in timm's names, without a classifier"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    return vit_checkpoint(NAME, container.tensors, arguments, positions="dino")


__all__ = ["NAME", "convert", "matches", "outputs", "request"]
