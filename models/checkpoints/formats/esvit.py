"""EsViT's full checkpoint (arXiv 2106.09785, github.com/microsoft/esvit).

Student and teacher, each a Swin, CvT or ViL with its projection heads at the same level, or a
ResNet in two wrappers. The teacher is served; `weights="student"` selects the student.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.self_supervised import backbone_checkpoint, backbone_kind
from models.checkpoints.families.swin import block_outputs as outputs
from models.checkpoints.families.vit import choose_weights, split_prefix

NAME = "esvit"
RESNET = "backbone.backbone."

__all__ = ["NAME", "convert", "matches", "outputs"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    teacher = container.sets.get("teacher", {})
    if "student" not in container.sets or "head.last_layer.weight_v" not in teacher:
        return None
    if (kind := backbone_kind(teacher)) in ("Swin", "CvT", "ViL"):
        return f"student and teacher, each a {kind} with its heads beside it"
    if backbone_kind(split_prefix(teacher, RESNET)[0]) == "ResNet":
        return "student and teacher, each a ResNet in two wrappers"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    weights = choose_weights(container, arguments, "teacher")
    prefix = RESNET if any(key.startswith(RESNET) for key in weights) else ""
    kept, dropped = split_prefix(weights, prefix, drop=("head.", "head_dense."))
    return backbone_checkpoint(NAME, kept, arguments, dropped=dropped)
