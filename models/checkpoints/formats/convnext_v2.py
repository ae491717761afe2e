"""ConvNeXt V2 (arXiv 2301.00808, github.com/facebookresearch/ConvNeXt-V2).

Classifiers, the published FCMAE backbones, and checkpoints of FCMAE's training script, whose sparse
convolutions are converted to dense ones. `model` is served, as upstream evaluates it;
`weights="model_ema"` selects the exponential average.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.convnext import convnext_checkpoint
from models.checkpoints.families.convnext import convnext_outputs as outputs
from models.checkpoints.families.known import Known
from models.checkpoints.families.vit import choose_weights

NAME = "convnext-v2"
SPARSE = "encoder.stages.0.0.dwconv.kernel"
PRETRAINING = ("proj.", "mask_token", "decoder.", "pred.")

__all__ = ["NAME", "convert", "matches", "outputs"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if SPARSE in keys:
        return "sparse convolutions under encoder, as FCMAE's script saves them"
    if "stages.0.0.grn.gamma" in keys and "downsample_layers.0.0.weight" in keys:
        return "downsample_layers, and stages with grn"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights` (`model`), `img_size` in pixels, one side or both (224); further ones
    of `convnext_preprocess`."""
    weights = choose_weights(container, arguments, "model")
    dropped = tuple(key for key in weights if key.startswith(PRETRAINING))
    known = Known(arguments, container.script)
    return convnext_checkpoint(NAME, _dense(weights), known, dropped)


def _dense(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with dense convolutions, without parts that only pre-training uses.

    Sparse kernels are (k * k, in, out), or (k * k, C) if depthwise, in column-major order.
    """
    dense: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key.startswith(PRETRAINING):
            continue
        name = key.removeprefix("encoder.").replace(".ln.", ".").replace(".linear.", ".")
        if name.endswith(".kernel"):
            name = name.removesuffix("kernel") + "weight"
            side = round(value.shape[0] ** 0.5)
            if value.dim() == 2:
                value = torch.unflatten(value.T, 1, (side, side))[:, None].transpose(2, 3)
            else:
                value = torch.unflatten(value.permute(2, 1, 0), 2, (side, side)).transpose(2, 3)
        elif name.endswith(".bias"):
            value = value.flatten()
        dense[name] = value.contiguous()
    return dense
