"""Memory during minutes of load."""

import asyncio
import resource
import statistics
from pathlib import Path

import torch

from benchmarks.gpu.options import Options, Row, Rows
from benchmarks.gpu.server import served
from benchmarks.photos import jpegs
from service.types import Call

# Memory may grow by this share, after its first third.
FLAT = 0.02


def soak(options: Options) -> Rows:
    """Minutes of load: whether memory stays flat after the first third."""

    async def measure(network: str, engine: str) -> Row:
        async with served(options, network, engine, options.precision) as server:
            samples: list[tuple[int, int]] = []

            async def sample() -> None:
                while True:
                    await asyncio.sleep(options.seconds / 20)
                    samples.append((_resident(), _device_bytes(options)))

            sampling = asyncio.create_task(sample())
            calls = [[Call(network, None)], [Call(f"{network}-embed", None)]]
            seconds = options.seconds * (5 if options.quick else 100)
            rate, _ = await server.run(jpegs(), calls, options.clients, seconds)
            sampling.cancel()
        third = max(1, len(samples) // 3)
        growth = {}
        for number, name in enumerate(("resident", "device")):
            values = [each[number] for each in samples]
            middle, last = (statistics.mean(values[a:b] or [0]) for a, b in
                            ((third, 2 * third), (2 * third, None)))  # fmt: skip
            growth[f"{name}_growth"] = (last - middle) / middle if middle else 0.0
        flat = all(value <= FLAT for value in growth.values())
        return {"network": network, "engine": engine, "images_per_s": rate, **growth, "holds": flat}

    yield asyncio.run(measure(options.networks[0], options.engines[0]))


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _device_bytes(options: Options) -> int:
    return torch.cuda.memory_reserved(options.device) if options.is_gpu else 0
