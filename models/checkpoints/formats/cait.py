"""CaiT (arXiv 2103.17239, github.com/facebookresearch/deit), with a classifier or under `model`."""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.cait import CAIT, cait_checkpoint
from models.checkpoints.families.cait import feature_map as outputs
from models.checkpoints.families.known import Known, number
from models.checkpoints.families.vit import choose_weights
from models.inputs.transforms import Preprocess

NAME = "cait"

__all__ = ["NAME", "convert", "matches", "outputs"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if "architecture" in arguments or not keys >= {CAIT, "patch_embed.proj.weight"}:
        return None
    if container.wrapper == "model":
        return "blocks_token_only, and patches embedded by a convolution, under model"
    if not container.wrapper and "head.weight" in keys:
        return "a flat state dict with blocks_token_only, a convolution of patches and a classifier"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights` (`model`), `crop_pct` of the evaluation (1)."""
    weights = choose_weights(container, arguments, "model")
    known = Known(arguments, container.script)
    crop = number("crop_pct", known.get("crop_pct", 1.0, "eval_crop_ratio"))
    preprocess = Preprocess(crop_pct=crop)
    return cait_checkpoint(NAME, weights, preprocess=preprocess, assumed=known.assumed)
