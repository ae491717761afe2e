"""XCiT (arXiv 2106.09681, github.com/facebookresearch/xcit), with a classifier or under `model`."""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.cait import feature_map as outputs
from models.checkpoints.families.known import Known, number
from models.checkpoints.families.self_supervised import backbone_kind
from models.checkpoints.families.vit import choose_weights
from models.checkpoints.families.xcit import xcit_checkpoint
from models.inputs.transforms import Preprocess

NAME = "xcit"

__all__ = ["NAME", "convert", "matches", "outputs"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if "architecture" in arguments or backbone_kind(container.tensors) != "XCiT":
        return None
    if container.wrapper == "model":
        return "cls_attn_blocks under model"
    if not container.wrapper and "head.weight" in container.tensors:
        return "a flat state dict with cls_attn_blocks and a classifier"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights` (`model`), `crop_pct` of the evaluation (1, or what the training
    script evaluated with); see `xcit_checkpoint`."""
    weights = choose_weights(container, arguments, "model")
    known = Known(arguments, container.script)
    cropped = container.script.get("full_crop") is False  # the script's own default
    crop = number("crop_pct", known.get("crop_pct", 0.875 if cropped else 1.0))
    preprocess = Preprocess(crop_pct=crop)
    return xcit_checkpoint(NAME, weights, known, preprocess=preprocess)
