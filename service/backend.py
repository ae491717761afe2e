"""The one seam between gateway and workers. Nothing above it knows where the models are."""

from collections.abc import Sequence
from typing import Any, Protocol

from service.types import FitRequest, HeadUpload, Health, InferRequest, InferResult

PARTS = ("head.safetensors", "report.json", "curve.png", "confusion.png")


class Heads(Protocol):
    """Heads that came after the catalog: uploaded, or fitted here. They are models, too."""

    async def all(self) -> Sequence[dict[str, Any]]:
        """Every head, described as a model; those being fitted with their `progress`."""

    async def get(self, name: str) -> dict[str, Any]:
        """One head, described."""

    async def put(self, upload: HeadUpload) -> dict[str, Any]:
        """Take a trained head, keep it, and serve it."""

    async def fit(self, request: FitRequest) -> dict[str, Any]:
        """Begin to fit a head in the background, and describe it."""

    async def delete(self, name: str) -> None:
        """Forget a head, or stop fitting it."""

    async def read(self, name: str, part: str) -> bytes:
        """A file of a head: one of PARTS."""


class Backend(Protocol):
    """What the gateway needs. All methods raise ServiceError and nothing else on purpose."""

    @property
    def heads(self) -> Heads:
        """The heads that may come and go."""

    async def start(self) -> None:
        """Begin loading the start-up models; returns without waiting for them."""

    async def close(self) -> None:
        """Answer what was accepted, then stop."""

    async def infer(self, request: InferRequest) -> InferResult:
        """Answer every image of the request; cancelling drops what still waits."""

    async def models(self) -> Sequence[dict[str, Any]]:
        """Every model of the catalog, described."""

    async def model(self, name: str) -> dict[str, Any]:
        """One model, described."""

    async def load(self, name: str) -> dict[str, Any]:
        """Load a model and describe it."""

    async def unload(self, name: str) -> dict[str, Any]:
        """Unload a model and describe it."""

    def knows(self, model: str) -> bool:
        """Whether the catalog has a model of that name; quick, and from what is known now."""

    def health(self) -> Health:
        """Whether the worker side is alive and ready."""
