"""Gateway and worker in one process: the default way to run."""

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from models.catalog import load_catalog
from models.registry import Registry
from service.gateway.app import create_app
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
    uvicorn.run(
        create_embedded_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
    )
