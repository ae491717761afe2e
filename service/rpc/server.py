"""The gRPC server around a backend."""

import asyncio
import logging

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.backend import Backend
from service.metrics import Metrics
from service.open_inference.metadata import is_ready
from service.rpc.context import Deps
from service.rpc.open_inference import OpenInference
from service.rpc.vision import Vision
from service.settings import Settings
from service.stubs import open_inference_pb2, vision_pb2
from service.stubs.open_inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from service.stubs.vision_pb2_grpc import add_VisionServicer_to_server

logger = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 0.5
ROOM_FOR_THE_REST = 1024 * 1024  # of a message, beside its images

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

SERVICES = (
    vision_pb2.DESCRIPTOR.services_by_name["Vision"].full_name,
    open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)


class RpcServer:
    """Serves a backend on one address until stopped.

    Health (grpc.health.v1) is told for the server (""), for both services and for every model by
    its name.
    """

    def __init__(self, backend: Backend, settings: Settings, metrics: Metrics) -> None:
        self._backend = backend
        self._health = health.aio.HealthServicer()
        self._told: dict[str, bool] = {}
        self._teller: asyncio.Task[None] | None = None
        self._deps = Deps(backend, settings, metrics)

    async def start(self, address: str, *, shared: bool = False) -> int:
        """Listen on `host:port` or `unix:path`; the port is returned.

        Args:
            shared: let other processes listen there, too; each gets some of the connections.

        Raises:
            OSError: the address cannot be had.
        """
        settings = self._deps.settings
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", settings.max_request_bytes + ROOM_FOR_THE_REST),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", int(shared)),
                # clients may ping as often as Vitrail's gateway does, so that both ends soon
                # learn of a dead one
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 4000),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
            )
        )
        add_VisionServicer_to_server(Vision(self._deps), self._server)
        add_GRPCInferenceServiceServicer_to_server(OpenInference(self._deps), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        await self._server.start()
        self._teller = asyncio.create_task(self._tell_health())
        logger.info("gRPC on %s", address, extra={"port": port})
        return port

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, answer the accepted ones within `grace_s`, and stop."""
        if self._teller is not None:
            self._teller.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _tell_health(self) -> None:
        while True:
            await self._tell_once()
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _tell_once(self) -> None:
        try:
            ready = self._backend.health().ready
            now = dict.fromkeys(("", *SERVICES), ready)
            now |= {model["name"]: is_ready(model) for model in await self._backend.models()}
            now |= dict.fromkeys(self._told.keys() - now, False)  # heads that are gone
            for name, serving in now.items():
                if self._told.get(name) is not serving:
                    await self._health.set(name, SERVING if serving else NOT_SERVING)
            self._told = now
        except Exception:  # what cannot be told now is told next time
            logger.exception("health cannot be told")
