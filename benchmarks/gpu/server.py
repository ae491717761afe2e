"""A worker's backend in this process, and clients that keep it busy."""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from benchmarks.gpu.networks import catalog
from benchmarks.gpu.options import Options
from models.inference import decode
from models.inputs.images import DEFAULT_LIMITS
from models.inputs.types import Input
from models.registry import Registry
from models.trunks.base import Trunk
from service.errors import ServiceError
from service.metrics import Metrics
from service.types import Call, InferRequest
from service.worker.backend import LocalBackend
from service.worker_options import WorkerOptions

# How long an engine may take to build or choose its passes: less than a part may take.
SETTLE_S = 300


def check_end(trunk: Trunk, end: float) -> None:
    """Raises:
    TimeoutError: it is later than `end`, in seconds of `time.monotonic`.
    """
    if time.monotonic() > end:
        raise TimeoutError(f"{trunk.engine.name} has not built its passes in {SETTLE_S} s")


@dataclass(slots=True)
class Served:
    """A worker's backend in this process: queues, lanes and decoding, without HTTP."""

    backend: LocalBackend
    network: str
    max_batch: int

    @property
    def trunk(self) -> Trunk:
        return self.backend.registry.ready(self.network).trunk

    async def warm(self, inputs: Sequence[Input], calls: Sequence[Sequence[Call]], clients: int,
                   seconds: float, images: int = 1) -> None:  # fmt: skip
        """Load, until the engine has built the passes of such requests for all sizes of batches."""
        end = time.monotonic() + SETTLE_S
        await self.run(inputs, calls, clients, seconds, images)
        while not self.trunk.engine.settled:
            check_end(self.trunk, end)
            await asyncio.sleep(0.1)
            await self.run(inputs, calls, clients, 0.1, images)  # some engines choose by passes
        await asyncio.to_thread(self._run_sizes, inputs[0])
        await self.run(inputs, calls, clients, seconds, images)

    @torch.inference_mode()
    def _run_sizes(self, item: Input) -> None:
        trunk = self.trunk
        prepared = trunk.prepare(decode(item, DEFAULT_LIMITS))
        for size in trunk.engine.warm_up_sizes(self.max_batch):
            trunk.forward(trunk.collate([prepared] * size))

    async def run(self, inputs: Sequence[Input], calls: Sequence[Sequence[Call]], clients: int,
                  seconds: float, images: int = 1) -> tuple[float, list[float]]:  # fmt: skip
        """Images per second of clients that send one request at a time, and each one's seconds.

        Args:
            images: of a request.
        """
        turns = itertools.cycle(zip(itertools.cycle(inputs), itertools.cycle(calls), strict=False))
        latencies: list[float] = []
        started = time.monotonic()

        async def client() -> None:
            while (sent := time.monotonic()) - started < seconds:
                item, own = next(turns)
                await self.infer([item] * images, own)
                latencies.append(time.monotonic() - sent)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        return images * len(latencies) / (time.monotonic() - started), latencies

    async def infer(self, items: Sequence[Input], calls: Sequence[Call]) -> None:
        request = InferRequest(inputs=items, calls=calls, deadline=math.inf)
        for result in (await self.backend.infer(request)).images:
            for output in [result.error] if result.error else result.outputs:
                if isinstance(output, ServiceError):
                    raise output


@asynccontextmanager
async def served(
    options: Options,
    network: str,
    engine: str,
    precision: str,
    transform: str = "exact",
    **more: Any,
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
        device=str(options.device), engine=engine, precision=precision, transform=transform,
        threads=resolved.threads, streams=resolved.streams,
    )  # fmt: skip
    backend = LocalBackend(registry, worker, Metrics(CollectorRegistry()))
    await backend.start()
    try:
        for name in (network, f"{network}-embed"):
            await backend.load(name)
        yield Served(backend, network, worker.max_batch_size)
    finally:
        await backend.close()
