"""A process that serves HTTP and calls workers over gRPC. Never imports torch."""

import socket

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from service.gateway.app import create_app
from service.gateway.server import run_server
from service.keys import Keys
from service.metrics import Metrics
from service.remote.backend import RemoteBackend
from service.remote.metrics import RemoteMetrics
from service.rpc.server import RpcServer
from service.settings import Settings


def create_gateway_app(settings: Settings, rpc_address: str | None, *, shared: bool) -> FastAPI:
    """The application, with the settings' workers as its backend.

    Args:
        rpc_address: where gRPC listens; None for no gRPC server.
        shared: several gateway processes listen on the same gRPC port.
    """
    metrics = Metrics(CollectorRegistry())
    ProcessCollector(registry=metrics.registry)
    PlatformCollector(registry=metrics.registry)
    backend = RemoteBackend(settings, RemoteMetrics(metrics.registry))
    keys = Keys(settings)
    rpc = RpcServer(backend, settings, metrics, keys).serving(rpc_address, shared=shared)
    return create_app(settings, backend, metrics, rpc, keys)


def serve(
    settings: Settings, rpc_address: str | None = None, listener: socket.socket | None = None
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        rpc_address: where gRPC listens; None for no gRPC server.
        listener: a listening socket, inherited from the supervisor.
    """
    app = create_gateway_app(settings, rpc_address, shared=listener is not None)
    run_server(app, settings, listener)
