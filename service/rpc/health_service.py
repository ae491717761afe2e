"""Reports health by grpc.health.v1."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):
    """Tells which names are serving.

    grpcio's own holds a lock while it writes to a watcher, so that one who does not read keeps
    every status as it is. And its watchers stay until the server's grace is over.
    """

    def __init__(self) -> None:
        self._serving = {"": False}
        self._changed = asyncio.Event()  # another one after each change
        self._is_stopping = False

    def report(self, serving: Mapping[str, bool]) -> None:
        """Say of some names whether they are serving. Has no effect after `stop`."""
        if self._is_stopping or serving.items() <= self._serving.items():
            return
        self._serving.update(serving)
        self._tell()

    def stop(self) -> None:
        """From now on nothing is serving. Watchers are told, and that is the last they hear."""
        self._serving = dict.fromkeys(self._serving, False)
        self._is_stopping = True
        self._tell()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """A name's status, and again when it has changed. Changes meanwhile are left out."""
        last = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            elif self._is_stopping:
                return
            else:
                await changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, name: str) -> Any:
        if name not in self._serving:
            return UNKNOWN
        return SERVING if self._serving[name] else NOT_SERVING
