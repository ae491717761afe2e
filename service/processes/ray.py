"""A gateway in front of replicas on a Ray cluster, or on a Ray that it starts on this machine."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before Ray is imported, which reads them then.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from models.catalog import Catalog, load_catalog
from models.catalog_content import is_url
from models.checkpoints.store import default_store_path
from models.errors import CatalogError
from service.gateway.app import create_app
from service.gateway.server import run_server
from service.keys import Keys
from service.limits import Budget
from service.metrics import Metrics
from service.open_inference.shared_memory import SharedMemory
from service.processes.ports import check_free
from service.processes.ray_replica import Replica
from service.ray.backend import RayBackend
from service.ray.group import Group
from service.ray.groups import TrunkGroup, multiplexed, narrowed, trunk_groups
from service.ray.scaling import scale_by_queue
from service.ray.state import find_state, start_state
from service.rpc.server import RpcServer
from service.settings import Settings

# A replica's own queue refuses requests, not Ray's.
MAX_ONGOING_REQUESTS = 10_000
# A trunk group's application.
PREFIX = "vitrail-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What each deployment gets.

    Args:
        replicas: the fewest replicas.
        max_replicas: the most; they are added by the seconds of work that wait.
        cpus: cores of a replica.
        gpus: GPUs of a replica, a fraction for replicas that share one.
    """

    replicas: int = 1
    max_replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0


def serve(settings: Settings, address: str | None, placement: Placement) -> None:
    """Serve until SIGINT or SIGTERM, then answer the accepted requests and return.

    A Ray that was started here ends with this process. On an existing cluster the deployments go
    on, and the next start finds them.

    Args:
        address: of the cluster, `auto` for the one that this machine is part of; None to start one.
    """
    check_free(settings.host, settings.port)
    check_free(settings.host, settings.grpc_port)
    connect(address)
    try:
        run_server(create_ray_app(settings, placement), settings)
    finally:
        ray.shutdown()


def connect(address: str | None) -> None:
    """Connect to a cluster, or start one on this machine."""
    if address is not None:
        ray.init(address=address, namespace="vitrail")
    else:
        ray.init(address="local", namespace="vitrail", include_dashboard=False)


def create_ray_app(settings: Settings, placement: Placement) -> Any:
    """The application over deployments, which are created or updated, and a gRPC server beside."""
    catalog = read_catalog(settings)
    metrics = Metrics(CollectorRegistry())
    ProcessCollector(registry=metrics.registry)
    PlatformCollector(registry=metrics.registry)
    backend = RayBackend(
        catalog, deploy(settings, groups_of(settings, catalog), placement), find_state
    )
    keys, budget = Keys(settings), Budget(settings)
    memory = SharedMemory(settings.shared_memory)
    rpc = RpcServer(backend, settings, metrics, keys, budget, memory)
    beside = rpc.serving(settings.rpc_address())
    return create_app(settings, backend, metrics, beside, keys, budget, memory, rpc.stop)


def read_catalog(settings: Settings) -> Catalog:
    """The settings' catalog. If they name start-up models and others are not loaded on demand, only
    what shares trunks with those, so that no replicas stand idle.

    Raises:
        CatalogError: it cannot be read, lacks a start-up model, or is to be watched.
    """
    if settings.catalog_poll_s:
        raise CatalogError(
            "replicas on Ray do not watch the catalog; unset VITRAIL_CATALOG_POLL_S, and start "
            "vitrail ray again after a change"
        )
    catalog = load_catalog(settings.catalog)
    for name in settings.models:
        catalog.model(name)
    return narrowed(catalog, () if settings.model_memory_mb else settings.models)


def groups_of(settings: Settings, catalog: Catalog) -> list[TrunkGroup]:
    """The groups of trunks that each get a deployment."""
    groups = trunk_groups(catalog)
    if not settings.model_memory_mb:
        return groups
    return multiplexed(groups, settings.models or catalog.startup)


def heads_folder(settings: Settings) -> Path:
    """Where the state actor keeps heads."""
    return Path(settings.heads_folder or default_store_path() / "heads")


def deploy(settings: Settings, groups: Sequence[TrunkGroup], placement: Placement) -> list[Group]:
    """Create or update the groups' deployments. Returns before their models are loaded."""
    ray_serve.start(proxy_location="Disabled")
    start_state(heads_folder(settings))
    if not is_url(settings.catalog) and settings.catalog.endswith((".toml", os.sep)):
        settings = settings.model_copy(update={"catalog": str(Path(settings.catalog).resolve())})
    targets = [
        ray_serve.RunTarget(
            bind(settings, group, placement), name=f"{PREFIX}{group.name}", route_prefix=None
        )
        for group in groups
    ]
    handles = ray_serve.run_many(targets, wait_for_applications_running=False)
    return [Group(group, handle) for group, handle in zip(groups, handles, strict=True)]


def bind(settings: Settings, group: TrunkGroup, placement: Placement) -> Any:
    """A group's deployment with its arguments."""
    scaling: dict[str, Any] = {"num_replicas": placement.replicas}
    if placement.max_replicas > placement.replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=placement.replicas,
                max_replicas=placement.max_replicas,
                policy=AutoscalingPolicy(policy_function=scale_by_queue),
            )
        }
    deployment = ray_serve.deployment(
        Replica,
        name=group.name,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        logging_config={"enable_access_log": False},  # the gateway logs requests
        ray_actor_options={"num_cpus": placement.cpus, "num_gpus": placement.gpus},
        **scaling,
    )
    return deployment.bind(settings, group, max(1, math.floor(placement.cpus)))
