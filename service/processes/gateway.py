"""A process that serves HTTP and calls workers over gRPC. Never imports torch."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from service.gateway.app import create_app
from service.gateway.server import run_server
from service.keys import Keys
from service.limits import Budget
from service.metrics import Metrics
from service.open_inference.shared_memory import SharedMemory
from service.processes.heartbeat import beating
from service.remote.backend import RemoteBackend
from service.remote.metrics import RemoteMetrics
from service.rpc.server import RpcServer
from service.settings import Settings
from service.tracing import configure_tracing


def create_gateway_app(
    settings: Settings, rpc_address: str | None, *, shared: bool, heartbeat: int | None = None
) -> FastAPI:
    """The application, with the settings' workers as its backend.

    Args:
        rpc_address: where gRPC listens; None for no gRPC server.
        shared: several gateway processes listen on the same gRPC port.
        heartbeat: the supervisor's pipe, see `heartbeat.py`.
    """
    metrics = Metrics(CollectorRegistry())
    ProcessCollector(registry=metrics.registry)
    PlatformCollector(registry=metrics.registry)
    backend = RemoteBackend(settings, RemoteMetrics(metrics.registry))
    keys, budget = Keys(settings), Budget(settings)
    memory = SharedMemory(settings.shared_memory)
    server = RpcServer(backend, settings, metrics, keys, budget, memory)

    @asynccontextmanager
    async def beside() -> AsyncIterator[None]:
        async with (
            beating(heartbeat, backend, loads=False),
            server.serving(rpc_address, shared=shared),
        ):
            yield

    return create_app(settings, backend, metrics, beside(), keys, budget, memory, server.stop)


def serve(
    settings: Settings,
    rpc_address: str | None = None,
    listener: socket.socket | None = None,
    *,
    heartbeat: int | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        rpc_address: where gRPC listens; None for no gRPC server.
        listener: a listening socket, inherited from the supervisor.
        heartbeat: the supervisor's pipe, see `heartbeat.py`.
    """
    configure_tracing("vitrail-gateway")
    shared = listener is not None
    app = create_gateway_app(settings, rpc_address, shared=shared, heartbeat=heartbeat)
    run_server(app, settings, listener, supervised=heartbeat is not None)
