"""A process that owns a device and serves it over gRPC."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Collection
from dataclasses import replace

import uvloop
from prometheus_client import (
    CollectorRegistry,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from models.catalog import load_catalog
from models.registry import Registry
from models.trunks.devices import resolve_device
from service.garbage import leave_out_old_objects
from service.keys import Keys
from service.limits import Budget
from service.metrics import Metrics
from service.processes.heartbeat import beating
from service.ray.groups import narrowed
from service.rpc.server import RpcServer
from service.sampling import sampling
from service.settings import Settings
from service.tracing import configure_tracing
from service.triton_metrics import WithTritonNames
from service.worker.backend import LocalBackend
from service.worker.collector import BackendCollector, share_gauges


def create_backend(
    settings: Settings, only: Collection[str] | None = None
) -> tuple[LocalBackend, Metrics]:
    """A backend for the settings' catalog, and the metrics of this process.

    Args:
        only: the models that may be loaded at start; None for all. Of a replica on Ray, which knows
            no others than the gateway does.
    """
    catalog = load_catalog(settings.catalog)
    worker_options = settings.worker_options
    startup = [catalog.model(name).name for name in settings.models] or catalog.startup
    if only is not None:
        chosen = tuple(name for name in startup if name in only)
        named = () if settings.model_memory_mb else settings.models
        catalog = replace(narrowed(catalog, named), startup=chosen)
        worker_options = replace(worker_options, startup=())
    options = settings.worker_options.resolve(resolve_device(settings.device).type)
    registry = Registry(
        catalog,
        device=settings.device,
        precision=settings.precision,
        engine=settings.engine,
        transform=settings.transform,
        tf32=settings.tf32,
        threads=options.threads,
        streams=options.streams,
        map_weights=settings.map_weights,
    )
    metrics = Metrics(CollectorRegistry())
    backend = LocalBackend(registry, worker_options, metrics)
    ProcessCollector(registry=metrics.registry)
    PlatformCollector(registry=metrics.registry)
    metrics.registry.register(BackendCollector(backend))
    return backend, metrics


def serve(settings: Settings, address: str, *, heartbeat: int | None = None) -> None:
    """Serve gRPC until SIGINT or SIGTERM, then answer the accepted requests and return.

    Args:
        heartbeat: the supervisor's pipe, see `heartbeat.py`.
    """
    configure_tracing("vitrail-worker")
    uvloop.run(_serve(settings, address, heartbeat))


async def _serve(settings: Settings, address: str, heartbeat: int | None) -> None:
    stopping, hurrying = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        # A supervisor kills its workers at a second signal; one stop may send them several.
        (hurrying if stopping.is_set() and heartbeat is None else stopping).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    keys, budget = Keys(settings, worker=True), Budget(settings)
    backend, metrics = create_backend(settings)
    if settings.metrics_port:
        exported = (
            WithTritonNames(metrics.registry) if settings.triton_metrics else metrics.registry
        )
        start_http_server(settings.metrics_port, settings.host, exported)
    leave_out_old_objects()
    await backend.start()
    sharing = None
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        sharing = asyncio.create_task(share_gauges(BackendCollector(backend)))
    async with beating(heartbeat, backend, loads=True), sampling(metrics, budget):
        server = RpcServer(backend, settings, metrics, keys, budget)
        async with server.serving(address):
            await stopping.wait()
            backend.drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.drain_delay_s):
                    await hurrying.wait()
            cutting = asyncio.create_task(_cut(server, hurrying))
        cutting.cancel()
        await backend.close()
    if sharing is not None:
        sharing.cancel()


async def _cut(server: RpcServer, hurrying: asyncio.Event) -> None:
    """Stop without waiting for the accepted requests, at a second signal."""
    await hurrying.wait()
    await server.stop(0)
