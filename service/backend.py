"""The one seam between gateway and workers. Nothing above it knows where the models are."""

from collections.abc import Sequence
from typing import Any, Protocol

from service.types import Health, InferRequest, InferResult


class Backend(Protocol):
    """What the gateway needs. All methods raise ServiceError and nothing else on purpose."""

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
