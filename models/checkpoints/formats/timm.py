"""A plain timm state dict: the keys of `timm.create_model(architecture)`, and no others.

Of a checkpoint of timm's training script the exponential average is served, as timm loads it.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import open_clip
import timm
import torch

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.vit import choose_weights
from models.errors import CheckpointError

NAME = "timm"
AVERAGE = "state_dict_ema"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    """Requires `arguments["architecture"]`, which a state dict does not name."""
    architecture = arguments.get("architecture")
    if architecture is None or container.graph is not None or "vitrail" in container.metadata:
        return None
    if architecture in open_clip.list_models():
        return None
    if not timm.is_model(architecture):
        raise CheckpointError(
            f"timm has no architecture {architecture!r}; `timm.list_models()` has the names, and "
            "`open_clip.list_models()` those of two-tower models"
        )
    classifier = timm.get_pretrained_cfg(architecture).classifier
    shared = _own_keys(architecture) - {f"{classifier}.weight", f"{classifier}.bias"}
    if shared & container.tensors.keys():
        return f"the architecture is set to {architecture}, and the keys are timm's for it"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `architecture`, `img_size`, `weights` (`state_dict_ema`, if the file has it)."""
    architecture = str(arguments["architecture"])
    classifier = timm.get_pretrained_cfg(architecture).classifier
    default = AVERAGE if AVERAGE in container.sets else container.wrapper
    tensors = container.tensors
    if default == AVERAGE or "weights" in arguments:
        tensors = choose_weights(container, arguments, default)
    weight = tensors.get(f"{classifier}.weight")
    known = {key: arguments[key] for key in ("img_size",) if key in arguments}
    return Checkpoint(
        format=NAME,
        architecture=architecture,
        arguments={"num_classes": 0 if weight is None else weight.shape[0], **known},
        state_dict=dict(tensors),
        assumed={"weights": AVERAGE} if default == AVERAGE and "weights" not in arguments else {},
    )


@cache
def _own_keys(architecture: str) -> frozenset[str]:
    """The keys of the architecture's state dict, without allocating its weights."""
    with torch.device("meta"):
        return frozenset(timm.create_model(architecture).state_dict())
