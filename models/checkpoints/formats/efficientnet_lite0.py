"""EfficientNet-lite0 in the names of github.com/lukemelas/EfficientNet-PyTorch.

timm lists the same 296 tensors in the same order and shapes, so keys are translated by position.
The preprocessing is that of timm's own conversion: bicubic, crop 0.875, scaled to -1..1.
"""

from collections.abc import Mapping
from typing import Any

import timm

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.errors import CheckpointError

NAME = "efficientnet-lite0"
ARCHITECTURE = "tf_efficientnet_lite0"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    # The non-lite nets of the same authors have squeeze-and-excite layers (`_se_reduce`).
    if {"_conv_stem.weight", "_fc.weight"} <= keys and not any("_se_" in key for key in keys):
        return "keys _conv_stem and _fc, and no squeeze-and-excite"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    num_classes = container.tensors["_fc.weight"].shape[0]
    ours = timm.create_model(ARCHITECTURE, num_classes=num_classes).state_dict()
    pairs = list(zip(ours, container.tensors.values(), strict=False))
    if len(ours) != len(container.tensors) or any(ours[k].shape != v.shape for k, v in pairs):
        raise CheckpointError(
            f"{container.path}: an EfficientNet, but not of lite0's {len(ours)} shapes"
        )
    return Checkpoint(
        format=NAME,
        architecture=ARCHITECTURE,
        arguments={"num_classes": num_classes},
        state_dict=dict(pairs),
    )
