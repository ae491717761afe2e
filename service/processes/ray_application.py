"""What a configuration of Ray Serve names as `import_path`, for `serve deploy` and KubeRay: the
gateway behind Ray's HTTP proxy, in front of the deployments of `vitrail ray`."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from ray import serve as ray_serve
from ray.serve import Application

from models.catalog import Catalog
from service.gateway.app import create_app
from service.logs import configure_logs
from service.metrics import Metrics
from service.processes.ray import (
    MAX_ONGOING_REQUESTS,
    Placement,
    bind,
    groups_of,
    heads_folder,
    read_catalog,
)
from service.ray.backend import RayBackend
from service.ray.group import Group
from service.ray.groups import TrunkGroup
from service.ray.state import find_state, start_state
from service.settings import Settings

GATEWAY = "gateway"


def application(arguments: dict[str, Any]) -> Application:
    """The gateway and a deployment for each group of trunks. Ray calls this on a node of the
    cluster, whose environment has the settings.

    Args:
        arguments: of `Placement`, by name. They hold for each group.

    Raises:
        CatalogError: the catalog cannot be served.
        TypeError: there is no such argument.
    """
    settings, placement = Settings(), Placement(**arguments)
    catalog = read_catalog(settings)
    groups = groups_of(settings, catalog)
    start_state(heads_folder(settings))

    def create() -> FastAPI:
        return _create_app(settings, catalog, groups)

    deployment = ray_serve.deployment(
        ray_serve.ingress(create)(),
        name=GATEWAY,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(*(bind(settings, group, placement) for group in groups))


def _create_app(settings: Settings, catalog: Catalog, groups: Sequence[TrunkGroup]) -> FastAPI:
    """The application in a replica of the gateway. It has no gRPC server: Ray's proxy has the
    socket."""
    configure_logs(settings.log_level)
    metrics = Metrics(CollectorRegistry())
    ProcessCollector(registry=metrics.registry)
    PlatformCollector(registry=metrics.registry)
    name = ray_serve.get_replica_context().app_name
    handles = [ray_serve.get_deployment_handle(group.name, name) for group in groups]
    deployed = [Group(group, handle) for group, handle in zip(groups, handles, strict=True)]
    return create_app(settings, RayBackend(catalog, deployed, find_state), metrics)
