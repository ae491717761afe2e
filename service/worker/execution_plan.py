"""A request's calls, resolved to heads and grouped into the trunk passes that they share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from models.errors import ModelsError
from models.heads.registry import Head
from models.inputs.images import ImageLimits
from models.inputs.prepare import decode, prepare, size_of
from models.inputs.tiling import View
from models.inputs.types import Input
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
    modality: str
    head: Head
    head_call: HeadCall
    finish_options: dict[str, Any]

    @property
    def used(self) -> ModelUsed:
        preprocess = self.model.trunk_for(self.modality).preprocess
        return ModelUsed(self.model.name, self.head.task, self.model.digest, preprocess.digest)


@dataclass(slots=True)
class TrunkPass:
    """The calls that ride on one trunk pass, by their positions in the request."""

    trunk: str
    model: Model
    view: View | None = None
    positions: list[int] = field(default_factory=list)
    calls: list[HeadCall] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Way:
    """What becomes of a request's inputs of one modality."""

    resolved: Sequence[Resolved]
    passes: Sequence[TrunkPass]


def resolve(registry: Registry, call: Call, modality: str) -> Resolved:
    """Find a call's model and head, and check its options with that head.

    Raises:
        ServiceError: no such model, not ready, not its task, an option out of range, or inputs of
            the other modality.
    """
    try:
        entry = (
            registry.catalog.model(call.model)
            if call.model
            else registry.default_model(str(call.task))
        )
        model = registry.ready(entry.name)
        head = model.head_for(modality, call.task, call.options)
    except ModelsError as error:
        raise from_library(error) from error
    forward = {k: v for k, v in call.options.items() if k in head.forward_options}
    finish = {k: v for k, v in call.options.items() if k not in head.forward_options}
    trunk = entry.text if modality == "text" and entry.text else entry.trunk
    head_call = HeadCall(head, tuple(sorted(forward.items())))
    return Resolved(model, trunk, modality, head, head_call, finish)


def plan_way(resolved: Sequence[Resolved]) -> Way:
    """Group calls by trunk, and by how they want images: each input takes one pass of each, or as
    many as its view has pieces."""
    passes: dict[tuple[str, View | None], TrunkPass] = {}
    for position, item in enumerate(resolved):
        view = item.head.view if item.modality == "image" else None
        plan = TrunkPass(item.trunk, item.model, view)
        shared = passes.setdefault((item.trunk, view), plan)
        shared.positions.append(position)
        shared.calls.append(item.head_call)
    return Way(resolved, list(passes.values()))


def prepare_all(
    given: Input, passes: Sequence[TrunkPass], limits: ImageLimits
) -> tuple[list[list[torch.Tensor]], tuple[int, int]]:
    """An input as each pass's trunk takes it, in one piece or several; and an image's own (width,
    height).

    Raises:
        InputError: it cannot be decoded, or is not what the trunk takes.
    """
    decoded = decode(given, limits)
    prepared = [prepare(decoded, plan.model, plan.view, limits) for plan in passes]
    return prepared, size_of(decoded)
