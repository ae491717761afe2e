"""BEiT's fine-tuned classifiers (arXiv 2106.08254, v2 2208.06366, github.com/microsoft/unilm).

timm's names with separate biases of queries and values, or tables of relative positions, or both;
or whatever its script fine-tuned of iBOT (arXiv 2111.07832) and SLIP (arXiv 2112.12750). PeCo
(arXiv 2111.12710, github.com/microsoft/PeCo) is assumed to have the same layout.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.beit import OWN_TABLE, SCRIPT, SHARED, beit_checkpoint
from models.checkpoints.families.vit import MARKS

NAME = "beit-finetuned"
PUBLISHED_BY_ALL = {(732, 12), (732, 16)}  # tables of base and large at 224 pixels


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    marks = {"blocks.0.attn.q_bias", OWN_TABLE, SHARED} & keys
    if "architecture" not in arguments:  # which tells of a network of timm's
        if SCRIPT in container.script and keys >= MARKS | {"head.weight"}:
            marks |= {"head.weight"}
        if {"blocks.0.gamma_1", "fc_norm.weight"} <= keys:
            marks |= {"blocks.0.gamma_1"}
    if marks and "lm_head.weight" not in keys and "patch_embed.proj.weight" in keys:
        return f"blocks, {min(marks)}, and no lm_head"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    tensors = container.tensors
    pool = "avg" if "fc_norm.weight" in tensors else "token"
    statistics = None if _is_of_any_authors(tensors) else False
    return beit_checkpoint(
        NAME, container, tensors, arguments, global_pool=pool, by_imagenet=statistics
    )


def _is_of_any_authors(tensors: Mapping[str, Tensor]) -> bool:
    """Whether BEiT, BEiT v2 and PeCo publish files of these shapes, which differ in statistics."""
    table = tensors.get(OWN_TABLE)
    return table is not None and table.shape in PUBLISHED_BY_ALL
