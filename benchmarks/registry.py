"""Many heads in one registry: what one more costs, and what asking costs.

    python -m benchmarks.registry [--heads 10,1000,10000,100000]

All heads are linear ones of ten classes on one small trunk with random weights, and share one file.
Each row is one registry with so many heads in its catalog, a hundred of which are loaded. Figures
are medians of 200 calls, after garbage was collected:

- add: declare a head, read its file and build it.
- ready: what a request asks the registry for a model.
- describe: one model's description.
- unchanged, one change: what a gateway asks a worker once a second, see `service/changes.py`.
- everything: the names and descriptions of all models, as for a new gateway.
"""

import argparse
import asyncio
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import timm
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file

from models import Registry
from models.catalog import ModelEntry, load_catalog
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
LOADED = 100


def make_registry(folder: Path, heads: int) -> Registry:
    """A registry of one small trunk and so many heads, LOADED of which are loaded."""
    network = timm.create_model("test_vit")
    save_file(network.state_dict(), folder / "trunk.safetensors")
    (folder / "catalog.toml").write_text(CATALOG)
    catalog = load_catalog(folder / "catalog.toml")
    entries = {f"head-{number}": entry(f"head-{number}") for number in range(heads)}
    catalog = replace(catalog, models={**catalog.models, **entries})
    registry = Registry(catalog, device="cpu", store=Store(folder))
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
    for number in range(0, heads, max(1, heads // LOADED)):
        registry.load(f"head-{number}")
    return registry


def entry(name: str) -> ModelEntry:
    return ModelEntry(name=name, trunk="trunk", task="classify", head="file:head.safetensors")


def add(registry: Registry, name: str) -> None:
    registry.add(entry(name))
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
    print("| heads | add | ready | describe | unchanged | one change | everything |")
    print("|------:|----:|------:|---------:|----------:|-----------:|-----------:|")
    for count in map(int, arguments.heads.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            registry = make_registry(Path(folder), count)
            backend = LocalBackend(registry, WorkerOptions(), Metrics(CollectorRegistry()))
            registry.on_load = registry.on_unload = None  # nothing runs here
            row(backend, count)


def row(backend: LocalBackend, count: int) -> None:
    registry, name = backend.registry, "head-0"
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
    print(f"| {count:,} | {times} | {whole_s * 1e3:.0f} ms |", flush=True)


if __name__ == "__main__":
    main()
