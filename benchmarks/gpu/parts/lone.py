"""One request at a time."""

import asyncio
import statistics

import numpy as np

from benchmarks.gpu.options import Options, Row, Rows
from benchmarks.gpu.server import served
from benchmarks.gpu.serving import served_networks
from benchmarks.gpu.timing import durations_of
from service.types import Call


def lone(options: Options) -> Rows:
    """One request at a time, against the bare pass of one image."""

    async def measure(network: str, engine: str) -> Row:
        async with served(options, network, engine, options.precision) as server:
            trunk = server.trunk
            item = np.zeros((3, *trunk.preprocess.input_size), np.float32)
            calls = [Call(network, None)]
            await server.warm([item], [calls], 1, options.seconds / 4)
            pixels = trunk.collate([trunk.prepare(item)]).to(options.device)
            bare = durations_of(options, lambda: trunk.forward(pixels))
            _, latencies = await server.run([item], [calls], 1, options.seconds)
            asked, passed = statistics.median(latencies) * 1e3, statistics.median(bare) * 1e3
            return {"network": network, "engine": engine,
                    "ran": trunk.engine.report().name, "p50_ms": asked, "bare_ms": passed,
                    "over_ms": asked - passed, "holds": asked - passed <= 1.5}  # fmt: skip

    for network, engine in served_networks(options):
        yield asyncio.run(measure(network, engine))
