"""Throughput by replicas on Ray, and the hop to one: `python -m benchmarks.ray_replicas`.

The device is simulated, so that 16 of them fit on one machine: a pass is of one image and sleeps
PASS_S, while everything else is as in service: the gateway's backend, Ray's handles, the replicas
with their decoders and batchers. Four requests for each replica are under way all the time. Prints
images a second for each number of replicas, their share of what so many devices can do, and the
latency of a lone request beside that of a backend in this process.

Each replica is a process with torch: 16 take some 8 GB, and minutes to start on two cores.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.photos import jpegs
from models import Registry
from models.catalog import load_catalog
from models.trunks.base import Trunk
from service.metrics import Metrics
from service.ray.backend import RayBackend
from service.ray.groups import trunk_groups
from service.ray.state import find_state
from service.settings import Settings
from service.types import Call, InferRequest
from service.worker.backend import LocalBackend

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    import ray
    from ray import serve

    from service.processes import ray as ray_processes
    from service.processes.ray_replica import Replica

PASS_S = 0.2
PER_REPLICA = 4
SECONDS = 10.0
LONE = 30
PHOTO = jpegs()[0]
CATALOG = """
[trunks.a]
source = "file:a.safetensors"
architecture = "test_vit"
max_batch_size = 1

[models.a]
trunk = "a"
task = "embed"
"""


class Simulated(Replica):
    """A replica whose trunk sleeps in place of computing."""

    async def __init__(self, *arguments: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        await super().__init__(*arguments)
        simulate(self._backend.registry)


def simulate(registry: Registry) -> None:
    """Let a pass of the registry's trunk take PASS_S, and give what the first one gave."""
    trunk: Trunk = registry.load_trunk("a").trunk
    run, outputs = trunk.engine.run, dict[Any, Mapping[str, Tensor]]()

    def sleep(plan: Any, inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        if plan not in outputs:
            outputs[plan] = run(plan, inputs)
        time.sleep(PASS_S)
        return outputs[plan]

    trunk.engine.run = sleep  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", default="1,2,4,8,16")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_catalog(Path(folder))
        settings = Settings(
            catalog=str(path), device="cpu", engine="eager", heads_folder=folder, streams=1,
            max_queue_size=4096, log_level="error",
        )  # fmt: skip
        ray.init(address="local", namespace="vitrail", include_dashboard=False, num_cpus=64)
        setattr(ray_processes, "Replica", Simulated)  # noqa: B010  # what `deploy` deploys
        try:
            asyncio.run(measure(settings, [int(n) for n in arguments.replicas.split(",")]))
        finally:
            ray.shutdown()


def write_catalog(folder: Path) -> Path:
    """A catalog of one small network with random weights."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "a.safetensors")
    path = folder / "catalog.toml"
    path.write_text(CATALOG)
    return path


async def measure(settings: Settings, counts: list[int]) -> None:
    catalog = load_catalog(settings.catalog)
    groups = trunk_groups(catalog)
    print(f"a pass of one image sleeps {PASS_S * 1e3:.0f} ms")
    local, _ = await start_local(settings)
    alone = await lone(local)
    await local.close()
    for count in counts:
        placement = ray_processes.Placement(replicas=count, max_replicas=count, cpus=1)
        deployed = ray_processes.deploy(settings, groups, placement)
        backend = RayBackend(catalog, deployed, find_state)
        await backend.start()
        while len(deployed[0].snapshots) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        if count == counts[0]:
            hop = await lone(backend)
            print(f"a lone request: {alone * 1e3:.1f} ms in one process, {hop * 1e3:.1f} ms on Ray")
        rate = await rush(backend, PER_REPLICA * count)
        print(f"{count} replicas: {rate:.1f} images/s, {rate * PASS_S / count:.3f}", flush=True)
        await backend.close()
        await asyncio.to_thread(serve.delete, f"{ray_processes.PREFIX}{groups[0].name}")


async def start_local(settings: Settings) -> tuple[LocalBackend, Registry]:
    registry = Registry.from_catalog(settings.catalog, device="cpu")
    backend = LocalBackend(registry, settings.worker_options, Metrics(CollectorRegistry()))
    await backend.start()
    await backend.load("a")
    simulate(registry)
    return backend, registry


async def ask(backend: Any) -> None:
    request = InferRequest(
        inputs=[PHOTO], calls=[Call("a", "embed")], deadline=time.monotonic() + 60
    )
    [image] = (await backend.infer(request)).images
    assert image.error is None, image.error


async def lone(backend: Any) -> float:
    """The median time of a request while there is no other."""
    seconds = []
    for _ in range(LONE):
        started = time.perf_counter()
        await ask(backend)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


async def rush(backend: Any, clients: int) -> float:
    """Images a second while so many requests are under way all the time."""
    count, end = 0, time.monotonic() + SECONDS + 2

    async def client() -> None:
        nonlocal count
        while time.monotonic() < end:
            await ask(backend)
            count += end - SECONDS < time.monotonic() <= end

    await asyncio.gather(*(client() for _ in range(clients)))
    return count / SECONDS


if __name__ == "__main__":
    main()
