"""Keeps what a gateway knows of one worker's models as the worker says they are."""

import asyncio
import json
from collections.abc import Awaitable, Callable

from models.description import ModelDescription
from service.remote.models import WorkerModels
from service.stubs import vision_pb2 as pb

Ask = Callable[[pb.ListModelsRequest], Awaitable[pb.ListModelsResponse]]


class Follower:
    """Asks a worker for what has changed since it was asked last.

    Attributes:
        known: the worker's models, as of the last `refresh`.
    """

    def __init__(self, ask: Ask, on_change: Callable[[str], None]) -> None:
        """
        Args:
            ask: calls the worker's ListModels.
            on_change: called with the name of each model that was added, changed or removed.
        """
        self.known = WorkerModels()
        self._ask = ask
        self._on_change = on_change
        self._version = ""
        self._refreshing = asyncio.Lock()

    async def refresh(self) -> pb.ListModelsResponse:
        """Bring `known` up to date. Returns the last response, which has the worker's health.

        Raises:
            grpc.aio.AioRpcError: the worker cannot be reached.
        """
        async with self._refreshing:
            known, version, more = self.known, self._version, True
            changed: set[str] = set()
            try:
                while more:
                    response = await self._ask(pb.ListModelsRequest(since=version))
                    # A worker of an earlier release always sends everything.
                    if response.reset or not response.version:
                        known = WorkerModels()
                    models = [json.loads(model.description_json) for model in response.models]
                    changed |= known.apply(
                        list(map(ModelDescription.from_json, models)), response.removed
                    )
                    version, more = response.version, response.more
                if known is not self.known:
                    changed |= known.differences(self.known)
                self.known, self._version = known, version
            finally:  # what came before an error is known
                for name in changed:
                    self._on_change(name)
        return response
