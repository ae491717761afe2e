"""DINO's published backbones (arXiv 2104.14294, github.com/facebookresearch/dino).

A flat state dict of a ViT in timm's names, of a ResNet-50 in torchvision's, or of an XCiT in its
authors', without a classifier.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.self_supervised import backbone_checkpoint, backbone_kind

NAME = "dino-backbone"
KEPT = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm.")
RESNET = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
XCIT = ("cls_token", "pos_embeder.", "patch_embed.proj.", "blocks.", "cls_attn_blocks.", "norm.")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if container.wrapper or container.metadata or "architecture" in arguments:
        return None
    kind = backbone_kind(container.tensors)
    kept = {"ViT": KEPT, "ResNet": RESNET, "XCiT": XCIT}.get(kind or "")
    if kept and all(key.startswith(kept) for key in keys):
        return f"a flat state dict of a {kind}, without a classifier"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    return backbone_checkpoint(NAME, container.tensors, arguments)


__all__ = ["NAME", "convert", "matches", "outputs", "request"]
