"""A request's calls, resolved to heads and grouped into the trunk passes that they share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from models.errors import InputError, ModelsError
from models.heads import Head
from models.model import Model
from models.registry import Registry
from service.errors import from_library
from service.types import Call, ModelUsed
from service.worker.runner import HeadCall


@dataclass(frozen=True, slots=True)
class Resolved:
    """A call with its model and head found, and its options split between the head's two steps."""

    model: Model
    trunk: str
    head: Head
    head_call: HeadCall
    finish_options: dict[str, Any]

    @property
    def used(self) -> ModelUsed:
        digests = (self.model.digest, self.model.trunk.preprocess.digest)
        return ModelUsed(self.model.name, self.head.task, *digests)


@dataclass(slots=True)
class TrunkPass:
    """The calls that ride on one trunk pass, by their positions in the request."""

    trunk: str
    model: Model
    positions: list[int] = field(default_factory=list)
    calls: list[HeadCall] = field(default_factory=list)


def resolve(registry: Registry, call: Call) -> Resolved:
    """Find a call's model and head, and check its options with that head.

    Raises:
        ServiceError: no such model, not ready, not its task, or an option out of range.
    """
    try:
        name = call.model or registry.catalog.default_model(str(call.task)).name
        model = registry.ready(name)
        head = model.head(call.task, call.options)
    except ModelsError as error:
        raise from_library(error) from error
    forward = {k: v for k, v in call.options.items() if k in head.forward_options}
    finish = {k: v for k, v in call.options.items() if k not in head.forward_options}
    trunk = registry.catalog.models[name].trunk
    return Resolved(model, trunk, head, HeadCall(head, tuple(sorted(forward.items()))), finish)


def plan_passes(resolved: Sequence[Resolved]) -> list[TrunkPass]:
    """Group calls by trunk: each image of the request takes one pass of each."""
    passes: dict[str, TrunkPass] = {}
    for position, item in enumerate(resolved):
        shared = passes.setdefault(item.trunk, TrunkPass(item.trunk, item.model))
        shared.positions.append(position)
        shared.calls.append(item.head_call)
    return list(passes.values())


def prepared_pixels(pixels: np.ndarray, model: Model) -> torch.Tensor:
    """Pixels that the caller has preprocessed, as the model's trunk takes them.

    Raises:
        InputError: not (3, H, W) of the trunk's input size, or not finite.
    """
    wanted = (3, *model.trunk.preprocess.input_size)
    if pixels.shape != wanted:
        raise InputError(
            f"pixel_values for {model.name} have shape {list(wanted)}, not {list(pixels.shape)}",
            field="pixel_values",
        )
    if not np.isfinite(pixels).all():
        raise InputError("pixel_values has values that are not finite", field="pixel_values")
    return torch.from_numpy(pixels.astype(np.float32))  # a copy: the message's memory is read-only
