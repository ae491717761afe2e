"""Many VQT heads on one trunk, compared with separate models and with the trunk alone.

    python -m benchmarks.heads [--model dinov2-focus-embed] [--heads 1,8,64,256] [--images 64]
    python -m benchmarks.heads --engine openvino --ways mixed --heads 1,64,1000

Heads have random weights and one query token per block, as published. The variants take turns for
several rounds, all with the service's batcher and runner; figures are medians.

- mixed: each image is for one head, drawn at random.
- all: each image is for all heads.
- apart: as mixed, but every head has a queue of its own, as in servers that do not share trunks.
"""

import argparse
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from prometheus_client import CollectorRegistry

from models import Registry
from models.checkpoints.checkpoint import HeadState
from models.heads.registry import create_head
from models.heads.vqt import Vqt
from models.inference import HeadCall
from models.trunks.base import Trunk
from service.metrics import Metrics
from service.worker.batch_queue import BatchQueue, Entry
from service.worker.batcher import Batcher
from service.worker.device import create_device
from service.worker.runner import Item, Runner, Threads
from service.worker.scheduler import Scheduler
from service.worker_options import WorkerOptions

LABELS = tuple(map(str, range(20)))

# For each image its queue and the heads to run.
Requests = list[tuple[str, Sequence[HeadCall]]]


class Bench:
    """A trunk with one queue for all heads, and one queue for each head."""

    def __init__(self, trunk: Trunk, count: int, batch: int) -> None:
        options = WorkerOptions().resolve(trunk.placement.device.type)
        threads = Threads(lane=options.lane_threads, wide=options.threads)
        metrics = Metrics(CollectorRegistry())
        self.trunk = trunk
        names = ["shared", *map(str, range(count))]
        self._runners = {
            name: Runner(name, trunk, create_device(trunk.placement.device), threads, metrics)
            for name in names
        }
        self._batcher = Batcher(
            Scheduler(lanes=options.streams),
            execute=lambda b: self._runners[b.queue.name].execute(b),
            drop=lambda entry: None,
        )
        for name in names:
            self._batcher.add_queue(BatchQueue(name, max_batch_size=batch, capacity=10**6))
        self._batcher.start()

    def run(self, requests: Requests) -> float:
        """Images per second, with all images queued at the start."""
        items = [Item.awaited(queue, self.trunk.blank(), calls) for queue, calls in requests]
        started = time.perf_counter()
        for item, _ in items:
            self._batcher.admit(item.trunk, 1)
            self._batcher.put(item.trunk, [Entry(item, object())])
        for _, future in items:
            for row in future.result().rows:
                if isinstance(row, Exception):
                    raise row
        return len(items) / (time.perf_counter() - started)


def random_head(trunk: Trunk, seed: int) -> HeadCall:
    generator = torch.Generator().manual_seed(seed)
    depth, dim = len(trunk.blocks), trunk.blocks[0].attn.qkv.in_features
    tensors = {
        "queries": torch.randn(depth, 1, dim, generator=generator) * 0.05,
        "classifier.0.weight": torch.randn(len(LABELS), dim * (1 + depth), generator=generator),
        "classifier.0.bias": torch.zeros(len(LABELS)),
    }
    return HeadCall.of(create_head("vqt", trunk, LABELS, HeadState(tensors)), {})


def resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="dinov2-focus-embed", help="a model of the trunk")
    parser.add_argument("--heads", default="1,8,64,256")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default="mixed,all,apart")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engine", default="eager")
    arguments = parser.parse_args()
    counts = [int(count) for count in arguments.heads.split(",")]
    catalog = Registry.from_catalog("demo", device=arguments.device, engine=arguments.engine)
    trunk = catalog.get(arguments.model).trunk
    before = resident_bytes()
    heads = [random_head(trunk, seed) for seed in range(max(counts))]
    grown = resident_bytes() - before
    ways = arguments.ways.split(",")
    bench = Bench(trunk, len(heads) if "apart" in ways else 0, arguments.batch)
    images = arguments.images

    def mixed(count: int) -> Requests:
        return [("shared", [random.choice(heads[:count])]) for _ in range(images)]

    def every(count: int) -> Requests:
        return [("shared", heads[:count])] * images

    def apart(count: int) -> Requests:
        return [(str(i), [heads[i]]) for i in random.choices(range(count), k=images)]

    makers = {"mixed": mixed, "all": every, "apart": apart}
    variants: dict[str, Callable[[], Requests]] = {"trunk alone": lambda: [("shared", ())] * images}
    for count in counts:
        for way in ways:
            variants[f"{count} {way}"] = partial(makers[way], count)
    for requests in variants.values():
        bench.run(requests()[: arguments.batch])
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, requests in variants.items():
            rates[name].append(bench.run(requests()))
    print(f"{trunk.architecture}, {trunk.engine.report().name}, batches of {arguments.batch}, "
          f"{arguments.rounds} rounds: medians")  # fmt: skip
    one = statistics.median(rates[f"{counts[0]} {ways[0]}"])
    for name, values in rates.items():
        rate = statistics.median(values)
        print(f"{name:>12}: {rate:8.1f} images/s, {one / rate:5.2f} times the time of the first")
    trunk_bytes = trunk.nbytes
    head = heads[0].head
    assert isinstance(head, Vqt)
    share = head.nbytes / trunk_bytes
    print(f"trunk: {trunk_bytes / 2**20:.1f} MB; head: {head.nbytes / 2**20:.3f} MB, {share:.2%}")
    print(f"{len(heads)} heads: resident memory grew by {grown / 2**20:.1f} MB")


if __name__ == "__main__":
    main()
