"""BEiT's fine-tuned classifiers (arXiv 2106.08254, github.com/microsoft/unilm).

timm's names with separate biases of queries and values, and a table of relative positions in each
block. PeCo (arXiv 2111.12710, github.com/microsoft/PeCo) is assumed to have the same layout.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.beit import beit_checkpoint

NAME = "beit-finetuned"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    is_beit = "blocks.0.attn.q_bias" in keys and "lm_head.weight" not in keys
    if is_beit and "head.weight" in keys and "visual.conv1.weight" not in keys:
        return "blocks with q_bias, and a head"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    pool = "avg" if "fc_norm.weight" in container.tensors else "token"
    return beit_checkpoint(NAME, container, container.tensors, arguments, global_pool=pool)
