"""Small-scale ViTs' self-supervised stage (arXiv 2210.07240).

Student and teacher, each a backbone with a projection `mlphead`. The teacher is served;
`weights="student"` selects the student. Upstream is
github.com/hananshafi/vits-for-small-scale-datasets.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.small_scale import small_scale_checkpoint
from models.checkpoints.families.vit import choose_weights, split_prefix

NAME = "small-scale-vits"

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if "mlphead.last_layer.weight_v" in container.sets.get("teacher", {}):
        return "student and teacher with a projection mlphead each"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    weights = choose_weights(container, arguments, "teacher")
    kept, dropped = split_prefix(weights, "backbone.")
    script = container.script
    config = {**{k: script[k] for k in ("num_heads", "dataset") if k in script}, **arguments}
    return small_scale_checkpoint(NAME, kept, config, dropped=dropped)
