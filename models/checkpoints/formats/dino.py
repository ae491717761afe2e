"""DINO's full checkpoint (arXiv 2104.14294, github.com/facebookresearch/dino).

Student and teacher, each a backbone (a ViT, ResNet or XCiT) with a projection head. The teacher is
served; `weights="student"` selects the student.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.self_supervised import backbone_checkpoint, backbone_kind
from models.checkpoints.families.vit import choose_weights, split_prefix

NAME = "dino"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    teacher = container.sets.get("teacher", {})
    kind = backbone_kind(split_prefix(teacher, "backbone.")[0])
    if kind not in ("ViT", "ResNet", "XCiT") or "student" not in container.sets:
        return None
    if "head.last_layer.weight_v" in teacher and "head.last_layer2.weight_v" not in teacher:
        return f"student and teacher, each a {kind} with one projection head"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    weights = choose_weights(container, arguments, "teacher")
    kept, dropped = split_prefix(weights, "backbone.")
    return backbone_checkpoint(NAME, kept, arguments, dropped=dropped)


__all__ = ["NAME", "convert", "matches", "outputs", "request"]
