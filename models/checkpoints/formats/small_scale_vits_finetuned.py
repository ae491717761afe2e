"""Small-scale ViTs' fine-tuned classifiers (arXiv 2210.07240).

A ViT, Swin or CaiT with its head under `model_state_dict`, which upstream overwrites by the flat
state dict at the end of fine-tuning. Upstream is
github.com/hananshafi/vits-for-small-scale-datasets.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.cait import FLAT_PATCH
from models.checkpoints.families.self_supervised import backbone_checkpoint, backbone_kind
from models.checkpoints.families.small_scale import image_size, preprocess_for, with_dataset

NAME = "small-scale-vits-finetuned"
HEADS = {192: 12}  # of the published ViT

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys, kind = container.tensors.keys(), backbone_kind(container.tensors)
    if "head.weight" not in keys or kind not in ("ViT", "Swin", "CaiT"):
        return None
    if container.wrapper == "model_state_dict":
        return f"a {kind} with its head under model_state_dict"
    if kind == "CaiT" and f"{FLAT_PATCH}weight" in keys:
        return "a CaiT whose patches are embedded by a linear layer"
    stages = {key.split(".")[1] for key in keys if key.startswith("layers.")}
    if kind == "Swin" and not container.wrapper and len(stages) == 3:
        return "a flat state dict of a Swin of three stages with its head"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    checkpoint = backbone_checkpoint(
        NAME,
        container.tensors,
        arguments,
        preprocess=preprocess_for(arguments),
        img_size=image_size(arguments),
        published=HEADS,
    )
    return with_dataset(checkpoint, arguments)
