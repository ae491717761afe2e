"""The values that gateway and worker exchange."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.description import ModelDescription
from models.inputs.types import Input
from service.errors import ServiceError

# An input's failure stays in its own entry. Failures with these statuses are not the inputs' fault,
# so if all inputs fail with one of them, the whole request fails.
WHOLE_REQUEST_STATUSES = (429, 500, 503, 504)


@dataclass(frozen=True, slots=True)
class Call:
    """One model to run on every input of a request.

    Args:
        model: None for the task's default model.
        task: None for the model's own task.
        options: as `Options.head_options` returns them.
    """

    model: str | None
    task: str | None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """Inputs, and the models to run on each of them.

    Args:
        inputs: in the client's order. An input that could not be read is represented by its error;
            backends receive requests without errors.
        deadline: in `time.monotonic` seconds.
        bulk: waits behind interactive requests.
    """

    inputs: Sequence[Input | ServiceError]
    calls: Sequence[Call]
    deadline: float
    bulk: bool = False

    @property
    def readable(self) -> list[Input]:
        """The inputs that are not errors, in order."""
        return [item for item in self.inputs if not isinstance(item, ServiceError)]


@dataclass(frozen=True, slots=True)
class ModelUsed:
    """The model that a call resolved to."""

    name: str
    task: str
    model_digest: str
    preprocess_digest: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds that an input spent in each stage, and the size of its batch."""

    decode_ms: float
    queue_ms: float
    compute_ms: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class ImageResult:
    """The result of one input: an error, or for each call its named arrays or its own error."""

    outputs: Sequence[Mapping[str, np.ndarray] | ServiceError] = ()
    error: ServiceError | None = None
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class InferResult:
    """One result for each input, in order; `models` is parallel to the request's calls."""

    models: Sequence[ModelUsed]
    images: Sequence[ImageResult]

    def raise_if_all_failed(self, *, alone: bool = True) -> None:
        """Fail the whole request if its only input failed, or if all inputs failed for reasons
        that are not their fault.

        Args:
            alone: whether an only input that is at fault fails the request.

        Raises:
            ServiceError: the first input's error.
        """
        errors = [image.error for image in self.images if image.error is not None]
        if not errors or len(errors) < len(self.images):
            return
        if (alone and len(errors) == 1) or all(
            error.status in WHOLE_REQUEST_STATUSES for error in errors
        ):
            raise errors[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadUpload:
    """A trained head's file.

    Args:
        kind: `lora` for a zip archive of peft's two files; empty for Vitrail's own file.
        trunk: only if the trunk has another name here than where the head was trained.
        replace: replace an existing head of that name.
    """

    name: str
    content: bytes = field(repr=False)
    kind: str = ""
    trunk: str | None = None
    replace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """A head to fit to the images of a zip archive, which has one folder for each class."""

    name: str
    trunk: str
    archive: bytes = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)
    replace: bool = False


@dataclass(frozen=True, slots=True)
class Health:
    """The state of the worker side.

    Args:
        live: False if only a restart can help.
        ready: whether to send traffic.
        reasons: why it is not live or not ready.
        draining: whether it will stop soon.
        loading: whether models are being loaded, replaced or removed.
    """

    live: bool
    ready: bool
    reasons: Sequence[str] = ()
    draining: bool = False
    loading: bool = False


@dataclass(frozen=True, slots=True)
class ModelChanges:
    """What has changed since a version of a backend's models.

    Args:
        version: what to ask with next time.
        models: those that were added or have changed.
        removed: the names of those that are gone.
        reset: all that was known before is void: these are the first of all models.
        more: there are further changes; ask again at once.
    """

    version: str
    models: Sequence[ModelDescription]
    removed: Sequence[str]
    reset: bool = False
    more: bool = False
