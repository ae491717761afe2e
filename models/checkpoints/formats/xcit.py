"""XCiT (arXiv 2106.09681, github.com/facebookresearch/xcit): the weights under `model`."""

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
    if "architecture" in arguments or container.wrapper != "model":
        return None
    if backbone_kind(container.tensors) == "XCiT":
        return "cls_attn_blocks under model"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights` (`model`), `crop_pct` of the evaluation (1); see `xcit_checkpoint`."""
    weights = choose_weights(container, arguments, "model")
    known = Known(arguments, container.script)
    preprocess = Preprocess(crop_pct=number("crop_pct", known.get("crop_pct", 1.0)))
    return xcit_checkpoint(NAME, weights, known, preprocess=preprocess)
