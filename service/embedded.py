"""Gateway and worker in one process: the default way to run."""

import contextlib
import signal
import sys

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from models.catalog import load_catalog
from models.registry import Registry
from service.gateway.app import create_app
from service.gateway.server import create_server
from service.metrics import Metrics
from service.settings import Settings
from service.worker.collector import EngineCollector
from service.worker.engine import Engine


def create_embedded_app(settings: Settings) -> FastAPI:
    """The application with its engine behind it in this process."""
    catalog = load_catalog(settings.catalog)
    for name in settings.models:
        catalog.model(name)
    registry = Registry(catalog, device=settings.device, dtype=settings.dtype)
    metrics = Metrics(CollectorRegistry())
    engine = Engine(registry, settings.engine, metrics)
    ProcessCollector(registry=metrics.registry)
    PlatformCollector(registry=metrics.registry)
    metrics.registry.register(EngineCollector(engine))
    return create_app(settings, engine, metrics, catalog.models)


def serve(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; then stop accepting, answer what was accepted, and return."""
    server = create_server(create_embedded_app(settings), settings)
    # uvicorn drains and then raises the signal again, for whoever handled it before
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
