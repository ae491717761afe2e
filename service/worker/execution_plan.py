"""A request's calls, resolved to heads and grouped into the trunk passes that they share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from models.catalog import ModelEntry
from models.errors import ModalityError, ModelsError
from models.heads.base import Head
from models.inference import (
    HeadCall,
    finish_options,
    image_size,
    least_side,
    prepare_pieces,
)
from models.inputs.images import ImageLimits
from models.inputs.jpeg_file import JpegFile
from models.inputs.tiling import View
from models.inputs.types import Input, Video, modality_of
from models.model import Model
from models.registry import Registry
from models.trunks.adapters import Adapter
from models.trunks.base import Trunk
from service.decoding.pool import ImageDecoder
from service.errors import InvalidInputError, from_library
from service.types import Call, ModelUsed
from service.worker.trunk_keys import key_of

# Models that an error names because they take what another one does not.
MAX_OTHERS = 5


@dataclass(frozen=True, slots=True)
class ResolvedCall:
    """A call with its model and head.

    Args:
        head_call: the head, with the options of its `forward`.
        finish_options: the options of its `finish`.
    """

    model: Model
    modality: str
    head: Head
    head_call: HeadCall
    finish_options: dict[str, Any]

    @property
    def answer_values(self) -> int:
        """The most numbers in the answer for one input, if the answer may be large; else 0."""
        return self.head.answer_values({**dict(self.head_call.options), **self.finish_options})

    @property
    def used(self) -> ModelUsed:
        """The model as results name it."""
        preprocess = self.model.trunk_for(self.modality).preprocess
        return ModelUsed(self.model.name, self.head.task, self.model.digest, preprocess.digest)


@dataclass(slots=True)
class TrunkPass:
    """The calls that share one trunk pass.

    Args:
        key: of the trunk's queue.
        view: how images are cut, if not by the trunk's transform.
        positions: the calls' positions in the request.
    """

    key: str
    trunk: Trunk
    view: View | None = None
    positions: list[int] = field(default_factory=list)
    calls: list[HeadCall] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ExecutionPlan:
    """How a request's inputs of one modality are processed: the calls, and the passes that each
    input takes."""

    calls: Sequence[ResolvedCall]
    passes: Sequence[TrunkPass]


def resolve(registry: Registry, call: Call, modality: str) -> ResolvedCall:
    """Find a call's model and head, and check its options with that head.

    Raises:
        ServiceError: the model is unknown or not ready, it does not do the task or take the
            modality, or an option is out of range.
    """
    try:
        return resolve_for(registry.ready(model_entry(registry, call).name), call, modality)
    except ModalityError as error:
        others = ", ".join(islice(_takers(registry, modality, call.task), MAX_OTHERS))
        hint = f"; models that take {modality}s: {others}" if others else ""
        raise InvalidInputError(f"{error}{hint}", field=error.field) from error
    except ModelsError as error:
        raise from_library(error) from error


def _takers(registry: Registry, modality: str, task: str | None) -> Iterator[str]:
    """The catalog's loaded models that take a modality for a task, or for any if None."""
    for name in sorted(registry.declared):
        with suppress(ModelsError):  # it is not loaded
            model = registry.ready(name)
            if modality in model.modalities and (task is None or task in model.tasks):
                yield name


def model_entry(registry: Registry, call: Call) -> ModelEntry:
    """The catalog's entry of a call's model.

    Raises:
        ModelNotFoundError: there is none.
    """
    if call.model:
        return registry.catalog.model(call.model)
    return registry.default_model(str(call.task))


def resolve_for(model: Model, call: Call, modality: str) -> ResolvedCall:
    """Find a call's head among a model's, and check its options with that head.

    Raises:
        ModelsError: the model does not do the task or take the modality, or an option is out of
            range.
    """
    head = model.head_for(modality, call.task, call.options)
    head_call = HeadCall.of(head, call.options)
    return ResolvedCall(model, modality, head, head_call, finish_options(head, call.options))


def answer_values(resolved: Mapping[str, Sequence[ResolvedCall]], inputs: Sequence[Input]) -> int:
    """The most numbers in the answer for all inputs, of the calls of their modalities."""
    each = {kind: sum(call.answer_values for call in calls) for kind, calls in resolved.items()}
    return sum(each[modality_of(item)] for item in inputs)


def plan_execution(calls: Sequence[ResolvedCall]) -> ExecutionPlan:
    """Group calls by trunk, view and adapter. Each input takes one pass per group, or one per piece
    that the view cuts it into."""
    passes: dict[tuple[Trunk, View | None, Adapter | None], TrunkPass] = {}
    for position, call in enumerate(calls):
        view = call.head.view if call.modality == "image" else None
        trunk = call.model.trunk_for(call.modality)
        key = (trunk, view, call.head.request.adapter)
        shared = passes.setdefault(key, TrunkPass(key_of(trunk), trunk, view))
        shared.positions.append(position)
        shared.calls.append(call.head_call)
    return ExecutionPlan(calls, list(passes.values()))


Prepared = torch.Tensor | JpegFile


def prepare_all(
    item: Input, passes: Sequence[TrunkPass], limits: ImageLimits, decoder: ImageDecoder
) -> tuple[list[Sequence[Prepared]], tuple[int, int]]:
    """Decode an input and preprocess it for each pass that does not decode it in its batch.

    Returns:
        For each pass the input's pieces, one or several; and the (width, height) of an image.

    Raises:
        InputError: the input cannot be decoded, or the trunk does not take it.
    """
    files = [_open_jpeg(item, each, limits) for each in passes]
    rest = [each for each, file in zip(passes, files, strict=True) if file is None]
    size = next((file.size for file in files if file is not None), (0, 0))
    decoded: list[list[torch.Tensor]] = []
    if rest:
        decoded, size = decode_all(item, rest, limits, decoder)
    remaining = iter(decoded)
    return [next(remaining) if file is None else [file] for file in files], size


def _open_jpeg(item: Input, trunk_pass: TrunkPass, limits: ImageLimits) -> JpegFile | None:
    if trunk_pass.view is not None or not isinstance(item, bytes):
        return None
    return trunk_pass.trunk.open_jpeg(item, limits)


def decode_all(
    item: Input, passes: Sequence[TrunkPass], limits: ImageLimits, decoder: ImageDecoder
) -> tuple[list[list[torch.Tensor]], tuple[int, int]]:
    """Decode an input on the CPU and preprocess it for each pass, as `prepare_all`."""
    if isinstance(item, Video):
        return [[_prepare_clip(item, each.trunk, limits, decoder)] for each in passes], (0, 0)
    min_side = least_side([(each.trunk, each.view) for each in passes])
    with decoder.decoded(item, min_side) if isinstance(item, bytes) else nullcontext(item) as image:
        prepared = [prepare_pieces(image, each.trunk, each.view, limits) for each in passes]
        return prepared, image_size(image)


def _prepare_clip(
    clip: Video, trunk: Trunk, limits: ImageLimits, decoder: ImageDecoder
) -> torch.Tensor:
    with closing(decoder.frames(clip.content, trunk.preprocess.choice)) as frames:
        return trunk.prepare(frames, limits)
