"""The plain values that pass between gateway and worker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.errors import ServiceError


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
    """Encoded images, and what to do with each. `deadline` is in `time.monotonic` seconds."""

    images: Sequence[bytes]
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


@dataclass(frozen=True, slots=True)
class Health:
    """`live`: restarting would not help. `ready`: send traffic. `reasons` say why not."""

    live: bool
    ready: bool
    reasons: Sequence[str] = ()
