"""A process that owns a device and serves it over gRPC."""

import asyncio
import os
import signal

import uvloop
from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from models.catalog import load_catalog
from models.registry import Registry
from service.metrics import Metrics
from service.rpc.server import RpcServer
from service.settings import Settings
from service.worker.backend import Engine
from service.worker.collector import EngineCollector, share_gauges


def create_engine(settings: Settings) -> tuple[Engine, Metrics]:
    """The engine of a catalog, and the metrics of its process."""
    catalog = load_catalog(settings.catalog)
    for name in settings.models:
        catalog.model(name)
    registry = Registry(catalog, device=settings.device, dtype=settings.dtype)
    metrics = Metrics(CollectorRegistry())
    engine = Engine(registry, settings.engine, metrics)
    ProcessCollector(registry=metrics.registry)
    PlatformCollector(registry=metrics.registry)
    metrics.registry.register(EngineCollector(engine))
    return engine, metrics


def serve(settings: Settings, address: str) -> None:
    """Serve gRPC on an address until SIGINT or SIGTERM; then answer what was accepted."""
    uvloop.run(_serve(settings, address))


async def _serve(settings: Settings, address: str) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    engine, metrics = create_engine(settings)
    if settings.metrics_port:
        start_http_server(settings.metrics_port, settings.host, metrics.registry)
    await engine.start()
    sharing = None
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        sharing = asyncio.create_task(share_gauges(EngineCollector(engine)))
    server = RpcServer(engine, settings, metrics)
    await server.start(address)
    await stopping.wait()
    await server.stop(settings.drain_timeout_s)
    await engine.close()
    if sharing is not None:
        sharing.cancel()
