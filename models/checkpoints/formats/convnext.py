"""ConvNeXt (arXiv 2201.03545, github.com/facebookresearch/ConvNeXt), hierarchical or isotropic.

The weights in upstream's names under `model`; `weights="model_ema"` selects the exponential average
of a training checkpoint.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.convnext import (
    convnext_checkpoint,
    convnext_outputs,
    convnext_preprocess,
    renamed,
)
from models.checkpoints.families.known import Known
from models.checkpoints.families.vit import choose_weights
from models.networks import OWN
from models.reference_outputs import ReferenceRun

NAME = "convnext"
HIERARCHICAL = {"downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"}
ISOTROPIC = {"stem.weight", "blocks.0.dwconv.weight", "blocks.0.pwconv1.weight"}


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if keys >= HIERARCHICAL and "stages.0.0.grn.gamma" not in keys:
        return "downsample_layers, and stages without grn"
    if keys >= ISOTROPIC:
        return "a stem, and blocks with dwconv"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights` (`model`), `img_size` in pixels, one side or both (224); further ones
    of `convnext_preprocess`."""
    weights = choose_weights(container, arguments, "model")
    known = Known(arguments, container.script)
    if "stem.weight" in weights:
        return _isotropic(weights, known)
    return convnext_checkpoint(NAME, weights, known)


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """Of a hierarchical network those of ConvNeXt V2."""
    return convnext_outputs(run) if hasattr(run.network, "stages") else {}


def _isotropic(tensors: Mapping[str, Tensor], known: Known) -> Checkpoint:
    dim, _, _, patch = tensors["stem.weight"].shape
    head = tensors.get("head.weight")
    return Checkpoint(
        format=NAME,
        architecture="convnext-isotropic",
        library=OWN,
        arguments={
            "dim": dim,
            "depth": len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
            "patch_size": patch,
            "layer_scale": "blocks.0.gamma" in tensors,
            "num_classes": 0 if head is None else head.shape[0],
        },
        state_dict={renamed(key): value for key, value in tensors.items()},
        preprocess=convnext_preprocess(known),
        assumed=known.assumed,
    )
