"""The networks that `benchmarks.gpu` measures, with random weights: no download is needed."""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file

from models.inputs.types import Input
from models.registry import Registry
from models.trunks.base import Trunk
from service.errors import ServiceError
from service.metrics import Metrics
from service.types import Call, InferRequest
from service.worker.backend import LocalBackend
from service.worker_options import WorkerOptions

# timm's names; arguments of the checkpoint.
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit-b16": ("vit_base_patch16_224", {}),
    "clip-l14": ("vit_large_patch14_clip_224", {}),  # the image tower
    "dinov2-b": ("vit_base_patch14_dinov2", {"img_size": 224}),
    "convnextv2-b": ("convnextv2_base", {}),
    "lite0": ("efficientnet_lite0", {}),
    "tiny": ("test_vit", {}),  # to try the benchmark itself
}


@dataclass(frozen=True, slots=True)
class Options:
    """What all parts take.

    Args:
        folder: where the bundle and the networks' files are.
        seconds: of one measurement.
        batches: batch sizes of the forward-only ceiling.
        clients: requests in flight.
        quick: tiny networks and few rounds, to try the benchmark itself.
    """

    folder: Path
    device: torch.device
    networks: tuple[str, ...]
    engines: tuple[str, ...]
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    clients: int
    seconds: float
    quick: bool
    shared: Path
    done: dict[str, Any] = field(default_factory=dict)  # earlier parts' rows, by part

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has done what was started."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)


def catalog(options: Options, network: str) -> Path:
    """A catalog of one network as `NAME` (classify) and `NAME-embed`, written where missing."""
    path = options.folder / f"{network}.toml"
    if path.is_file():
        return path
    architecture, arguments = NETWORKS[network]
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    made = timm.create_model(architecture, num_classes=1000, **arguments)
    save_file(made.state_dict(), options.folder / f"{network}.safetensors")
    settings = ", ".join(f"{key} = {value}" for key, value in arguments.items())
    path.write_text(
        f'[trunks.{network}]\nsource = "file:{network}.safetensors"\n'
        f'architecture = "{architecture}"\narguments = {{{settings}}}\n'
        f'[models.{network}]\ntrunk = "{network}"\ntask = "classify"\n'
        f'[models.{network}-embed]\ntrunk = "{network}"\ntask = "embed"\n'
    )
    return path


def load_trunk(options: Options, network: str, engine: str, precision: str) -> Trunk:
    """The network's trunk, with the pass of its classifier built."""
    registry = Registry.from_catalog(
        catalog(options, network), device=str(options.device), engine=engine, precision=precision
    )
    model = registry.get(network)
    model.build()
    return model.trunk


@dataclass(slots=True)
class Served:
    """A worker's backend in this process: queues, lanes and decoding, without HTTP."""

    backend: LocalBackend
    network: str

    @property
    def trunk(self) -> Trunk:
        return self.backend.registry.ready(self.network).trunk

    async def run(
        self, inputs: Sequence[Input], calls: Sequence[Sequence[Call]], clients: int, seconds: float
    ) -> tuple[float, list[float]]:
        """Requests per second of clients that send one input at a time, and each one's seconds."""
        turns = itertools.cycle(zip(itertools.cycle(inputs), itertools.cycle(calls), strict=False))
        latencies: list[float] = []
        started = time.monotonic()

        async def client() -> None:
            while (sent := time.monotonic()) - started < seconds:
                item, own = next(turns)
                await self.infer(item, own)
                latencies.append(time.monotonic() - sent)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        return len(latencies) / (time.monotonic() - started), latencies

    async def infer(self, item: Input, calls: Sequence[Call]) -> None:
        request = InferRequest(inputs=[item], calls=calls, deadline=math.inf)
        [result] = (await self.backend.infer(request)).images
        for output in [result.error] if result.error else result.outputs:
            if isinstance(output, ServiceError):
                raise output


@asynccontextmanager
async def served(
    options: Options, network: str, engine: str, precision: str, **more: Any
) -> AsyncIterator[Served]:
    """A backend that serves a network, ready."""
    worker = WorkerOptions(
        max_batch_size=max(options.batches),
        max_queue_size=16 * options.clients,
        heads_folder=str(options.folder / "heads"),
        probe_interval_s=1e6,
        **more,
    )
    resolved = worker.resolve(options.device.type)
    registry = Registry.from_catalog(
        catalog(options, network),
        device=str(options.device), engine=engine, precision=precision,
        threads=resolved.threads, streams=resolved.streams,
    )  # fmt: skip
    backend = LocalBackend(registry, worker, Metrics(CollectorRegistry()))
    await backend.start()
    try:
        for name in (network, f"{network}-embed"):
            await backend.load(name)
        yield Served(backend, network)
    finally:
        await backend.close()
