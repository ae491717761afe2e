"""Models on demand, and budgets that are too small: `python -m benchmarks.on_demand`.

Eight small models with random weights, on trunks of their own, are asked for at random by sixteen
clients without pause. Prints the median time of a request for a model that is loaded, and for one
that has to replace another; then requests a second where all models fit into the budget, and where
only some of them do.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file

from benchmarks.photos import jpegs
from models import Registry
from models.checkpoints.store import Store
from service.metrics import Metrics
from service.types import Call, InferRequest
from service.worker.backend import LocalBackend
from service.worker.trunk_sizes import MIB
from service.worker_options import WorkerOptions

MODELS = 8
CLIENTS = 16
SWAPS = 10
PHOTO = jpegs()[0]


def write_catalog(folder: Path, architecture: str) -> float:
    """A catalog of models that differ by their weights only. Returns MiB of one."""
    tables = []
    for number in range(MODELS):
        torch.manual_seed(number)
        path = folder / f"m{number}.safetensors"
        save_file(timm.create_model(architecture, num_classes=10).state_dict(), path)
        tables.append(
            f'[trunks.m{number}]\nsource = "file:{path}"\narchitecture = "{architecture}"\n'
            f'[models.m{number}]\ntrunk = "m{number}"\ntask = "classify"\n'
        )
    (folder / "catalog.toml").write_text("startup = []\n" + "".join(tables))
    return path.stat().st_size / MIB


async def ask(backend: LocalBackend, number: int) -> float:
    """Seconds of a request for a model."""
    started = time.monotonic()
    request = InferRequest(inputs=[PHOTO], calls=[Call(f"m{number}", None)], deadline=started + 600)
    [image] = (await backend.infer(request)).images
    assert image.error is None, image.error
    return time.monotonic() - started


async def rush(backend: LocalBackend, seconds: float) -> float:
    """Requests a second."""
    count, end = 0, time.monotonic() + seconds

    async def client(seed: int) -> None:
        nonlocal count
        draw = random.Random(seed)
        while time.monotonic() < end:
            await ask(backend, draw.randrange(MODELS))
            count += time.monotonic() < end

    await asyncio.gather(*map(client, range(CLIENTS)))
    return count / seconds


async def start(folder: Path, budget_mb: float) -> LocalBackend:
    registry = Registry.from_catalog(
        folder / "catalog.toml", device="auto", store=Store(folder / "store")
    )
    options = WorkerOptions(
        model_memory_mb=max(1, round(budget_mb)), heads_folder=str(folder / "heads")
    )
    backend = LocalBackend(registry, options, Metrics(CollectorRegistry()))
    await backend.start()
    return backend


async def measure(folder: Path, size_mb: float, seconds: float) -> None:
    one = await start(folder, size_mb * 1.5)
    await ask(one, 0)
    warm = statistics.median([await ask(one, 0) for _ in range(SWAPS)])
    swap = statistics.median([await ask(one, 1 + number % 2) for number in range(SWAPS)])
    print(
        f"a model of {size_mb:.0f} MB: {warm * 1e3:.0f} ms loaded, {swap * 1e3:.0f} ms swapped in"
    )
    await one.close()
    for fitting in (MODELS, MODELS * 3 // 4, MODELS // 2, MODELS // 4):
        backend = await start(folder, size_mb * (fitting + 0.5))
        for number in range(MODELS):
            await ask(backend, number)
        rate = await rush(backend, seconds)
        print(f"{fitting} of {MODELS} models fit: {rate:.1f} requests/s", flush=True)
        await backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", default="vit_tiny_patch16_224")
    parser.add_argument("--seconds", type=float, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size_mb = write_catalog(Path(folder), arguments.architecture)
        asyncio.run(measure(Path(folder), size_mb, arguments.seconds))


if __name__ == "__main__":
    main()
