"""A request's calls, resolved to heads and grouped into the trunk passes that they share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from models.errors import InputError, ModelsError
from models.heads import Head
from models.images import ImageLimits, decode_image
from models.model import Model
from models.registry import Registry
from models.text import MAX_CHARACTERS, TextTrunk
from service.errors import from_library
from service.types import Call, Input, ModelUsed
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
    positions: list[int] = field(default_factory=list)
    calls: list[HeadCall] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Way:
    """What becomes of a request's inputs of one modality."""

    resolved: Sequence[Resolved]
    passes: Sequence[TrunkPass]


def modality_of(item: Input) -> str:
    """`text` or `image`."""
    return "text" if isinstance(item, str) else "image"


def resolve(registry: Registry, call: Call, modality: str) -> Resolved:
    """Find a call's model and head, and check its options with that head.

    Raises:
        ServiceError: no such model, not ready, not its task, an option out of range, or inputs of
            the other modality.
    """
    try:
        catalog = registry.catalog
        entry = catalog.model(call.model) if call.model else catalog.default_model(str(call.task))
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
    """Group calls by trunk: each input takes one pass of each."""
    passes: dict[str, TrunkPass] = {}
    for position, item in enumerate(resolved):
        shared = passes.setdefault(item.trunk, TrunkPass(item.trunk, item.model))
        shared.positions.append(position)
        shared.calls.append(item.head_call)
    return Way(resolved, list(passes.values()))


def prepared_text(text: str, model: Model) -> torch.Tensor:
    """A text's token ids, as the model's text trunk takes them.

    Raises:
        InputError: empty, or far longer than any tokenizer keeps.
    """
    if not text.strip():
        raise InputError("the text is empty", field="texts")
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"the text has {len(text)} characters; the limit is {MAX_CHARACTERS}", field="texts"
        )
    trunk = model.trunk_for("text")
    assert isinstance(trunk, TextTrunk)
    return trunk.tokenize(text)


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


def prepare(
    given: Input, passes: Sequence[TrunkPass], limits: ImageLimits
) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """An input as each pass's trunk takes it, and an image's own (width, height).

    Raises:
        InputError: it cannot be decoded, or is not what the trunk takes.
    """
    if isinstance(given, str):
        return [prepared_text(given, plan.model) for plan in passes], (0, 0)
    if isinstance(given, np.ndarray):
        prepared = [prepared_pixels(given, plan.model) for plan in passes]
        return prepared, (given.shape[2], given.shape[1])
    decoded = decode_image(given, limits)
    return [plan.model.transform(decoded) for plan in passes], decoded.size
