"""The interface between gateway and workers. Code above it does not know where the models are."""

from collections.abc import Sequence
from typing import Protocol

from models.description import HeadDescription, ModelDescription
from service.types import FitRequest, HeadUpload, Health, InferRequest, InferResult

# The files of a head, by the names in `GET /heads/{name}/{part}`.
PARTS = ("head.safetensors", "report.json", "curve.png", "confusion.png")


class Heads(Protocol):
    """Heads added after the catalog was read: uploaded, or fitted here. They are models, too."""

    async def all(self) -> Sequence[HeadDescription]:
        """Every head, those being fitted included."""

    async def get(self, name: str) -> HeadDescription:
        """One head."""

    async def put(self, upload: HeadUpload) -> HeadDescription:
        """Store a trained head and serve it."""

    async def fit(self, request: FitRequest) -> HeadDescription:
        """Start to fit a head in the background."""

    async def delete(self, name: str) -> None:
        """Delete a head, or cancel its fit."""

    async def read(self, name: str, part: str) -> bytes:
        """The content of one of a head's files, see PARTS."""


class Backend(Protocol):
    """What the gateway and the gRPC server need. Methods raise ServiceError for expected errors."""

    @property
    def heads(self) -> Heads:
        """The heads added after the catalog was read."""

    async def start(self) -> None:
        """Start loading the start-up models; returns without waiting for them."""

    async def close(self) -> None:
        """Answer the accepted requests, then stop."""

    async def infer(self, request: InferRequest) -> InferResult:
        """Answer every input of the request. Cancelling drops the inputs that still wait."""

    async def models(self) -> Sequence[ModelDescription]:
        """Every model of the catalog."""

    async def model(self, name: str) -> ModelDescription:
        """One model."""

    async def load(self, name: str) -> ModelDescription:
        """Load a model; returns when it is ready."""

    async def unload(self, name: str) -> ModelDescription:
        """Unload a model."""

    def knows(self, model: str) -> bool:
        """Whether the catalog has a model of that name. Does not wait."""

    def health(self) -> Health:
        """Whether the worker side is alive and ready."""
