"""The plain values that pass between gateway and worker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from models.inputs.types import Input
from service.errors import ServiceError

# Failures of one image among several stay in its entry; these say that nothing was wrong with
# the images, so when all fail the same way the whole answer does.
WHOLE_REQUEST_STATUSES = (429, 500, 503, 504)


@dataclass(frozen=True, slots=True)
class Call:
    """One model wanted for every image of a request.

    `task` None is the model's own task; `model` None is the task's default model.
    """

    model: str | None
    task: str | None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """Inputs, and what to do with each. `deadline` is in `time.monotonic` seconds."""

    inputs: Sequence[Input]
    calls: Sequence[Call]
    deadline: float
    bulk: bool = False


@dataclass(frozen=True, slots=True)
class ModelUsed:
    """The model that a call resolved to."""

    name: str
    task: str
    model_digest: str
    preprocess_digest: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Where an image's time went, in milliseconds, and the size of the batch it rode in."""

    decode_ms: float
    queue_ms: float
    compute_ms: float
    batch_size: int


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What became of one image: an error, or for each call its named arrays or its own error."""

    outputs: Sequence[Mapping[str, np.ndarray] | ServiceError] = ()
    error: ServiceError | None = None
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class InferResult:
    """One result an image, in order; `models` is parallel to the request's calls."""

    models: Sequence[ModelUsed]
    images: Sequence[ImageResult]

    def raise_if_all_failed(self) -> None:
        """Raise the error of a lone image, or the one reason why none could be answered."""
        errors = [image.error for image in self.images if image.error is not None]
        if not errors or len(errors) < len(self.images):
            return
        if len(errors) == 1 or all(error.status in WHOLE_REQUEST_STATUSES for error in errors):
            raise errors[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadUpload:
    """A trained head's file. `trunk` where it is another name here than where it was trained;
    `replace`: instead of the one of that name, if there is one."""

    name: str
    content: bytes
    trunk: str | None = None
    replace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRequest:
    """A head to be fitted to the images of a zip archive whose folders are classes."""

    name: str
    trunk: str
    archive: bytes
    options: Mapping[str, Any] = field(default_factory=dict)
    replace: bool = False


@dataclass(frozen=True, slots=True)
class Health:
    """`live`: restarting would not help. `ready`: send traffic. `reasons` say why not."""

    live: bool
    ready: bool
    reasons: Sequence[str] = ()
