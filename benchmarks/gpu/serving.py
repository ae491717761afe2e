"""Measures a network as it is served."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from benchmarks.gpu.options import Options, Row, Rows
from benchmarks.gpu.server import served
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
    calls: list[list[Call]] | None = None, images: int = 1, **more: Any,
) -> Rows:  # fmt: skip
    """A row of how requests of so many images are served."""
    precision = options.precision
    clients = max(1, options.clients // images)

    async def measure() -> Row:
        async with served(options, network, engine, precision, **more) as server:
            items = inputs(server.trunk)
            own = calls or [[Call(network, None)]]
            await server.warm(items, own, clients, options.seconds / 2, images)
            before = time.process_time()
            rate, latencies = await server.run(items, own, clients, options.seconds, images)
            cpu_s = time.process_time() - before
            traced = server.run(items, own, clients, min(1.0, options.seconds), images)
            return {
                "ran": server.trunk.engine.report().name,
                "images_per_s": rate,
                "share_of_ceiling": share_of(rate, ceiling_of(options, network)),
                "p50_ms": percentile(latencies, 0.5) * 1e3,
                "p99_ms": percentile(latencies, 0.99) * 1e3,
                "cpu_ms_per_image": cpu_s / max(1, images * len(latencies)) * 1e3,
                **await busy(options, traced, f"{network}-{engine}"),
            }

    row = {"network": network, "precision": precision, "engine": engine, "images": images}
    try:
        yield {**row, **asyncio.run(measure())}
    except ServiceError as error:
        yield {**row, "refused": error.detail}


def verdict(options: Options, network: str, rows: Sequence[Row], limit: float | None,
            needed: float) -> Rows:  # fmt: skip
    """The best rate of a network, against what bounds it."""
    best = max((row["images_per_s"] for row in rows if "images_per_s" in row), default=None)
    if best is None or limit is None:
        return
    row = {"network": network, "best": best, "bound": limit, "share": best / limit}
    yield {**row, "holds": best >= needed * limit} if options.judges else row


async def busy(options: Options, load: Coroutine[Any, Any, Any], name: str) -> Row:
    """How much of the time kernels run during some load, by a profiler's trace."""
    if not options.is_gpu:
        load.close()
        return {}
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        await load
        options.wait()
        span_us = (time.perf_counter() - started) * 1e6
    profiler.export_chrome_trace(str(options.folder / f"trace-{name}.json"))
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    ]
    busy_us, longest_gap_us = busy_and_gap(kernels)
    return {"gpu_busy": busy_us / span_us, "longest_gap_ms": longest_gap_us / 1e3}


def busy_and_gap(spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The time in which at least one of these spans is, and the longest time between two in which
    none is."""
    total, gap, reached = 0.0, 0.0, min((start for start, _ in spans), default=0.0)
    for start, end in sorted(spans):
        gap = max(gap, start - reached)
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total, gap


def ceiling_of(options: Options, network: str) -> float | None:
    """The best forward-only rate of a network in the precision that is served, if it is known."""
    rates = [
        row["images_per_s"]
        for part, rows in options.done.items()
        for row in rows
        if part.startswith("ceiling") and "images_per_s" in row
        and (row["network"], row["precision"]) == (network, options.precision)
    ]  # fmt: skip
    return max(rates, default=None)


def share_of(rate: float, ceiling: float | None) -> float | None:
    return None if ceiling is None else rate / ceiling
