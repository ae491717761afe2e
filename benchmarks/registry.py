"""Many heads in one registry: what one more costs, and what asking costs.

    python -m benchmarks.registry [--heads 10,1000,10000,100000]

All heads are linear ones of ten classes on one small trunk with random weights, and share one file.
Each row is one registry that has grown to so many heads. Figures are medians of 200 calls, after
garbage was collected:

- add: declare a head, read its file and build it.
- ready: what a request asks the registry for a model.
- describe: one model's description.
- unchanged, one change: what a gateway asks a worker once a second, see `service/changes.py`.
- everything: the names and descriptions of all models, as for a new gateway.
- memory: by how much the process grew, a head.
"""

import argparse
import asyncio
import gc
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file

from models import Registry
from models.catalog import ModelEntry
from models.checkpoints.checkpoint import HeadState
from models.checkpoints.store import Store
from models.heads.files import HeadFile, encode_head
from service.metrics import Metrics
from service.worker.backend import LocalBackend
from service.worker_options import WorkerOptions

CATALOG = """
[trunks.trunk]
source = "file:trunk.safetensors"
architecture = "test_vit"

[models.trunk]
trunk = "trunk"
task = "embed"
"""
CLASSES = 10
CALLS = 200


def make_registry(folder: Path) -> Registry:
    """A registry of one small trunk, and `head.safetensors` beside it."""
    network = timm.create_model("test_vit")
    save_file(network.state_dict(), folder / "trunk.safetensors")
    (folder / "catalog.toml").write_text(CATALOG)
    registry = Registry.from_catalog(folder / "catalog.toml", device="cpu", store=Store(folder))
    trunk = registry.get("trunk").trunk
    state = HeadState(
        {
            "classifier.0.weight": torch.randn(CLASSES, network.num_features),
            "classifier.0.bias": torch.zeros(CLASSES),
        }
    )
    head = HeadFile(
        kind="linear",
        trunk="trunk",
        trunk_digest=trunk.digest,
        preprocess_digest=trunk.preprocess.digest,
        labels=tuple(map(str, range(CLASSES))),
        state=state,
    )
    (folder / "head.safetensors").write_bytes(encode_head(head))
    return registry


def add(registry: Registry, name: str) -> None:
    registry.add(
        ModelEntry(name=name, trunk="trunk", task="classify", head="file:head.safetensors")
    )
    registry.load(name)


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """The median time of a call."""
    gc.collect()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--heads", default="10,1000,10000,100000")
    arguments = parser.parse_args()
    print("|   heads | add | ready | describe | unchanged | one change | everything | memory |")
    print("|--------:|----:|------:|---------:|----------:|-----------:|-----------:|-------:|")
    with tempfile.TemporaryDirectory() as folder:
        registry = make_registry(Path(folder))
        backend = LocalBackend(registry, WorkerOptions(), Metrics(CollectorRegistry()))
        registry.on_load = registry.on_unload = None  # nothing runs here
        before = resident()
        for count in map(int, arguments.heads.split(",")):
            while len(registry.catalog.models) <= count:
                add(registry, f"head-{len(registry.catalog.models)}")
                if len(registry.catalog.models) % 1000 == 0:
                    gc.collect()
                    gc.freeze()
            row(backend, count, (resident() - before) / count)


def row(backend: LocalBackend, count: int, grown: float) -> None:
    registry, name = backend.registry, f"head-{count // 2 or 1}"
    more = iter(range(CALLS))
    added = microseconds(lambda: add(registry, f"more-{next(more)}"))
    for number in range(CALLS):
        registry.remove(f"more-{number}")

    async def everything() -> str:
        version, more = "", True
        while more:
            changes = await backend.changes(version)
            version, more = changes.version, changes.more
        return version

    async def changed() -> None:
        backend._note_change(name)
        assert len((await backend.changes(version)).models) == 1

    with asyncio.Runner() as runner:
        started = time.perf_counter()
        version = runner.run(everything())
        whole_s = time.perf_counter() - started
        figures = [
            added,
            microseconds(lambda: registry.ready(name)),
            microseconds(lambda: registry.describe(name)),
            microseconds(lambda: runner.run(backend.changes(version))),
            microseconds(lambda: runner.run(changed()), 1),
        ]
    times = " | ".join(f"{figure:.0f} µs" if figure >= 10 else f"{figure:.1f} µs"
                       for figure in figures)  # fmt: skip
    print(f"| {count:7,} | {times} | {whole_s * 1e3:.0f} ms | {grown / 1024:.1f} KiB |", flush=True)


def resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
