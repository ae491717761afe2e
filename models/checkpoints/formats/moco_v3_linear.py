"""MoCo v3's linear classifiers (arXiv 2104.02057, github.com/facebookresearch/moco-v3).

The whole ViT with its `head`, in timm's names; the training script stores `arch` and `best_acc1`
beside it. Both published sizes have 12 heads, independent of their channels.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.vit import MARKS, PATCHES, STEM, vit_checkpoint
from models.inputs.transforms import Preprocess

NAME = "moco-v3-linear"
HEADS = {384: 12, 768: 12}  # of the published sizes


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    notes = {"arch", "best_acc1"} <= container.beside.keys()
    keys = container.tensors.keys()
    patches = PATCHES in keys or STEM in keys
    whole = patches and keys >= (MARKS - {PATCHES}) | {"head.weight"}
    if notes and whole and "architecture" not in arguments:
        return "a ViT in timm's names with its head, and arch and best_acc1 beside it"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    return vit_checkpoint(
        NAME,
        container.tensors,
        arguments,
        published=HEADS,
        positions="fixed",
        preprocess=Preprocess(interpolation="bilinear"),
        conv_stem=STEM in container.tensors,
    )


__all__ = ["NAME", "convert", "matches", "outputs", "request"]
