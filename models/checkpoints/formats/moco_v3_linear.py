"""MoCo v3's linear classifiers (arXiv 2104.02057, github.com/facebookresearch/moco-v3).

The whole ViT with its `head` in timm's names, or the ResNet with its `fc`; the training script
stores `arch` and `best_acc1` beside it. Both published ViTs have 12 heads, independent of their
channels. SLIP's linear classifiers (arXiv 2112.12750, github.com/facebookresearch/SLIP) have the
same layout; its ViT-L has 16 heads.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.self_supervised import backbone_checkpoint, backbone_kind
from models.checkpoints.families.vit import STEM
from models.inputs.transforms import Preprocess

NAME = "moco-v3-linear"
HEADS = {384: 12, 768: 12, 1024: 16}  # of the published sizes
# Names that no library has for these; timm's ViT-S has six heads.
NETWORKS = ("vit_small", "vit_base", "vit_conv_small", "vit_conv_base")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    notes = {"arch", "best_acc1"} <= container.beside.keys()
    if not notes or ("architecture" in arguments and container.beside["arch"] not in NETWORKS):
        return None
    kind = backbone_kind(container.tensors)
    classifier = {"ViT": "head.weight", "ResNet": "fc.weight"}.get(kind or "")
    if classifier in container.tensors:
        return f"a {kind} with its classifier, and arch and best_acc1 beside it"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    return backbone_checkpoint(
        NAME,
        container.tensors,
        arguments,
        published=HEADS,
        positions="fixed",
        preprocess=Preprocess(interpolation="bilinear"),
        conv_stem=STEM in container.tensors,
    )


__all__ = ["NAME", "convert", "matches", "outputs", "request"]
