"""iBOT's full checkpoint (arXiv 2111.07832, github.com/bytedance/ibot).

Student and teacher, each with a head for the class token and one for patches. AttMask (arXiv
2203.12719, github.com/gkakogeorgiou/attmask) has the same layout. The teacher is served;
`weights="student"` selects the student, which is the one published for ImageNet-22k.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.self_supervised import backbone_checkpoint
from models.checkpoints.families.vit import choose_weights, split_prefix

NAME = "ibot"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    teacher = container.sets.get("teacher", {})
    if "student" in container.sets and "head.last_layer2.weight_v" in teacher:
        return "student and teacher with a head for the class token and one for patches"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    weights = choose_weights(container, arguments, "teacher")
    kept, dropped = split_prefix(weights, "backbone.", drop=("masked_embed",))
    return backbone_checkpoint(NAME, kept, arguments, dropped=dropped)


__all__ = ["NAME", "convert", "matches", "outputs", "request"]
