"""The interface between gateway and workers. The gateway does not know where the models are."""

from collections.abc import Sequence
from typing import Any, Protocol

from models.description import HeadDescription, ModelDescription
from service.types import (
    FitRequest,
    HeadUpload,
    Health,
    InferRequest,
    InferResult,
    ModelChanges,
)

# The files of a head, as `GET /heads/{name}/{part}` names them.
PARTS = ("head.safetensors", "report.json", "curve.png", "confusion.png")


class Heads(Protocol):
    """The heads that were uploaded or fitted. They are models, too."""

    async def all(self) -> Sequence[HeadDescription]:
        """Every head, including those being fitted."""

    async def get(self, name: str) -> HeadDescription:
        """One head."""

    async def put(self, upload: HeadUpload) -> HeadDescription:
        """Store a trained head and serve it."""

    async def fit(self, request: FitRequest) -> HeadDescription:
        """Start to fit a head in the background."""

    async def delete(self, name: str) -> None:
        """Delete a head, or cancel its fit."""

    async def read(self, name: str, part: str) -> bytes:
        """The content of a head's file, one of PARTS."""


class Backend(Protocol):
    """Runs models, in this process or elsewhere. Methods raise ServiceError for expected errors."""

    @property
    def heads(self) -> Heads:
        """The heads that were uploaded or fitted."""

    async def start(self) -> None:
        """Start loading the start-up models; returns without waiting for them."""

    def drain(self) -> None:
        """Report that it is not ready from now on, and serve as before."""

    async def close(self) -> None:
        """Answer the accepted requests, then stop."""

    def check_headers(self, model: str | None, *, bulk: bool, deadline: float) -> None:
        """Refuse a request before its body is read, if `infer` would refuse it whatever it holds.
        Does not wait.

        Args:
            model: None if the headers do not tell it.
            deadline: in `time.monotonic` seconds.
        """

    async def infer(self, request: InferRequest) -> InferResult:
        """Run the request's calls on its inputs. Cancelling drops the inputs that still wait."""

    async def models(self, start: int = 0, count: int | None = None) -> Sequence[ModelDescription]:
        """`count` models of the catalog from place `start` on, or all."""

    async def changes(self, since: str) -> ModelChanges:
        """What has changed in the models since a version that an earlier call returned. "" for all
        models."""

    async def model(self, name: str) -> ModelDescription:
        """One model."""

    async def load(self, name: str) -> ModelDescription:
        """Load a model; returns when it is ready."""

    async def unload(self, name: str) -> ModelDescription:
        """Unload a model."""

    def knows(self, model: str) -> bool:
        """Whether the catalog has a model of that name. Does not wait."""

    def state(self) -> dict[str, Any]:
        """What waits and what runs now, as JSON for people. Does not wait."""

    def health(self) -> Health:
        """Whether the worker side is alive and ready."""
