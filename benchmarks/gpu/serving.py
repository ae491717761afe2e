"""Measures a network as it is served."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu.options import Options, Row, Rows
from benchmarks.gpu.server import Served, served
from benchmarks.load import percentile
from models.errors import ModelsError
from models.trunks.base import Trunk
from models.trunks.devices import Placement
from models.trunks.engines.registry import engine_class
from service.errors import ServiceError
from service.types import Call


def served_networks(options: Options) -> Iterator[tuple[str, str]]:
    """Networks with the engines that can run them."""
    for network in options.networks:
        for engine in options.engines:
            with contextlib.suppress(ModelsError):
                engine_class(engine).place(Placement(device=options.device))
                yield network, engine


def serve(
    options: Options, network: str, engine: str, inputs: Callable[[Trunk], list[Any]],
    calls: list[list[Call]] | None = None, **more: Any,
) -> Rows:  # fmt: skip
    precision = options.precision

    async def measure() -> Row:
        async with served(options, network, engine, precision, **more) as server:
            items = inputs(server.trunk)
            own = calls or [[Call(network, None)]]
            await server.run(items, own, options.clients, options.seconds / 2)
            before = time.process_time()
            rate, latencies = await server.run(items, own, options.clients, options.seconds)
            cpu_s = time.process_time() - before
            busy = await busy_share(options, server, items, own)
            return {
                "images_per_s": rate,
                "share_of_ceiling": share_of_ceiling(options, network, precision, rate),
                "p50_ms": percentile(latencies, 0.5) * 1e3,
                "p99_ms": percentile(latencies, 0.99) * 1e3,
                "cpu_ms_per_image": cpu_s / max(1, len(latencies)) * 1e3,
                "gpu_busy": busy,
            }

    row = {"network": network, "precision": precision, "engine": engine}
    try:
        yield {**row, **asyncio.run(measure())}
    except ServiceError as error:
        yield {**row, "refused": error.detail}


async def busy_share(
    options: Options, server: Served, items: list[Any], calls: list[list[Call]]
) -> float | None:
    """The share of the time in which a kernel runs, from a profiler's trace."""
    if not options.is_gpu:
        return None
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        await server.run(items, calls, options.clients, min(1.0, options.seconds))
        options.wait()
        span_us = (time.perf_counter() - started) * 1e6
    profiler.export_chrome_trace(str(options.folder / f"trace-{server.network}.json"))
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / span_us


def share_of_ceiling(options: Options, network: str, precision: str, rate: float) -> float | None:
    """The rate over the best forward-only one of the same network and precision."""
    rates = [
        row["images_per_s"]
        for rows in options.done.values()
        for row in rows
        if "ran" in row and (row["network"], row["precision"]) == (network, precision)
    ]
    return rate / max(rates) if rates else None
