"""The gRPC server around a backend."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.backend import Backend
from service.keys import Keys
from service.limits import Budget
from service.metrics import Metrics
from service.open_inference.shared_memory import SharedMemory
from service.rpc.context import Deps
from service.rpc.health_service import HealthService
from service.rpc.open_inference import OpenInference
from service.rpc.reading import MessageReader
from service.rpc.vision import Vision
from service.settings import Settings
from service.stubs import open_inference_pb2, vision_pb2
from service.stubs.open_inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from service.stubs.vision_pb2_grpc import add_VisionServicer_to_server
from service.tls import server_credentials

logger = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 0.5
# Connections without calls for so long are closed. Clients open another one for their next call.
IDLE_MS = 600_000
# The size of a message without its images, at most.
MESSAGE_OVERHEAD_BYTES = 1024 * 1024

# The health service's name for Kubernetes' liveness probe.
LIVENESS = "liveness"

SERVICES = (
    vision_pb2.DESCRIPTOR.services_by_name["Vision"].full_name,
    open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)


class RpcServer:
    """Serves a backend on one address until stopped.

    Health (grpc.health.v1) is reported for the server (""), for both services, and for every model
    by its name; LIVENESS is serving unless only a restart can help.
    """

    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        metrics: Metrics,
        keys: Keys | None = None,
        budget: Budget | None = None,
        memory: SharedMemory | None = None,
    ) -> None:
        self._backend = backend
        self._health = HealthService()
        # The models that are reported, as of a version of the backend's.
        self._models: set[str] = set()
        self._since = ""
        # Those of them that an answer in parts has not named yet.
        self._stale: set[str] = set()
        self._reporter: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._deps = Deps(
            backend,
            settings,
            metrics,
            keys or Keys(settings),
            budget or Budget(settings),
            memory or SharedMemory(settings.shared_memory),
        )

    async def start(self, address: str, *, shared: bool = False) -> int:
        """Listen on `host:port` or `unix:path`.

        Args:
            shared: allow other processes to listen on the same address. Each gets a part of the
                connections.

        Returns:
            The port.

        Raises:
            OSError: the address is not available, or the certificate cannot be used.
        """
        settings = self._deps.settings
        credentials = server_credentials(settings)
        self._server = server = grpc.aio.server(
            interceptors=[MessageReader(settings)],
            options=(
                (
                    "grpc.max_receive_message_length",
                    settings.max_request_bytes + MESSAGE_OVERHEAD_BYTES,
                ),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_allowed_incoming_connections", settings.max_connections),
                ("grpc.so_reuseport", int(shared)),
                # More calls of a connection wait at its client. A gateway's share one connection,
                # so that it is the budget that refuses.
                ("grpc.max_concurrent_streams", 2 * settings.max_requests_in_flight + 100),
                # allow pings as frequent as the gateway's, by which both ends detect a dead peer
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 4000),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.max_connection_idle_ms", IDLE_MS),
                ("grpc.server_handshake_timeout_ms", int(settings.header_timeout_s * 1e3)),
            ),
        )
        add_VisionServicer_to_server(Vision(self._deps), server)
        add_GRPCInferenceServiceServicer_to_server(OpenInference(self._deps), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        try:
            if credentials is None or address.startswith("unix:"):
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        await server.start()
        self._reporter = asyncio.create_task(self._report_health())
        logger.info("gRPC on %s", address, extra={"port": port})
        return port

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, wait up to `grace_s` seconds for the accepted ones, and stop. A second
        call shortens the wait of the first."""
        if self._server is None:
            return
        if self._reporter is not None:
            self._reporter.cancel()
        self._health.stop()
        await self._server.stop(grace_s)

    @asynccontextmanager
    async def serving(self, address: str | None, *, shared: bool = False) -> AsyncIterator[None]:
        """A context in which the server runs, see `start`. Without an address, none runs."""
        if address is None:
            yield
            return
        await self.start(address, shared=shared)
        try:
            yield
        finally:
            await self.stop(self._deps.settings.drain_timeout_s)

    async def _report_health(self) -> None:
        while True:
            try:
                await self._report_once()
            except Exception:  # the next round tries again
                logger.exception("reporting health failed")
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _report_once(self) -> None:
        health = self._backend.health()
        ready = dict.fromkeys(("", *SERVICES), health.ready)
        self._health.report(ready | {LIVENESS: health.live})
        more = True
        while more:
            changes = await self._backend.changes(self._since)
            if changes.reset:
                self._stale |= self._models
            current = dict.fromkeys(changes.removed, False)
            current |= {model.name: model.is_ready for model in changes.models}
            self._models |= current.keys()
            self._models -= set(changes.removed)
            self._stale -= current.keys()
            if not changes.more:
                current |= dict.fromkeys(self._stale, False)  # gone before the reset
                self._models -= self._stale
                self._stale = set()
            self._health.report(current)
            self._since, more = changes.version, changes.more
