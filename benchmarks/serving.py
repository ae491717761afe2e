"""Images per second of a server and of the bare loop: `python -m benchmarks.serving`.

The bare loop and the server take turns for several rounds on the same photos, with the same model,
threads and allocator. Prints medians over the rounds, and the server's share of the best bare loop.
The load generator runs in this process, on the same cores as the server.
"""

import argparse
import multiprocessing
import os
import statistics
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from benchmarks.load import Load, build_requests, closed_loop, open_loop
from benchmarks.photos import jpegs
from benchmarks.servers import Server, free_port
from service.allocator import keep_freed_memory

CONNECTIONS = (1, 8, 32)
OPEN_LOADS = (0.5, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--route", default="classify")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    variants: dict[str, dict[str, Any]] = {
        f"1 worker, {cores} threads, batch 1": {"workers": 1, "threads": cores, "batch": 1},
        f"1 worker, {cores} threads, batch 16": {"workers": 1, "threads": cores, "batch": 16},
        f"{cores} workers, 1 thread, batch 1": {"workers": cores, "threads": 1, "batch": 1},
        f"{cores} workers, 1 thread, batch 4": {"workers": cores, "threads": 1, "batch": 4},
    }
    bare: dict[str, list[float]] = {name: [] for name in variants}
    served: dict[int, list[Load]] = {count: [] for count in CONNECTIONS}
    photos = jpegs()
    path = f"/{arguments.route}?model={arguments.model}"
    requests = build_requests(path, photos, "image/jpeg")
    port = free_port()
    with _bare_process(arguments.model) as measure, Server(port, arguments.model):
        for _ in range(arguments.rounds):
            for name, settings in variants.items():
                bare[name].append(measure({**settings, "seconds": arguments.seconds}))
            for count in CONNECTIONS:
                run = closed_loop(port, requests, count, arguments.seconds)
                served[count].append(uvloop.run(run))
        rates = {name: statistics.median(values) for name, values in bare.items()}
        best = max(rates.values())
        single = rates[f"1 worker, {cores} threads, batch 1"]
        print(f"{arguments.model}, {arguments.rounds} rounds of {arguments.seconds:g} s, "
              f"{cores} cores: medians")  # fmt: skip
        for name, rate in rates.items():
            print(f"  bare loop, {name:32} {rate:7.1f} images/s")
        for count, loads in served.items():
            _print_closed(count, loads, best, single)
        for share in OPEN_LOADS:
            load = uvloop.run(
                open_loop(port, requests, share * best, arguments.seconds * arguments.rounds / 2)
            )
            print(
                f"  open loop, {share:.0%} of the bare rate: {load.rate:6.1f} images/s, "
                f"p50 {load.percentile(0.5):.1f} p95 {load.percentile(0.95):.1f} "
                f"p99 {load.percentile(0.99):.1f} ms, {load.failures} failed"
            )


def _print_closed(count: int, loads: list[Load], best: float, single: float) -> None:
    rate = statistics.median(load.rate for load in loads)
    p50, p99 = (statistics.median(load.percentile(q) for load in loads) for q in (0.5, 0.99))
    failures = sum(load.failures for load in loads)
    ratio = f"{rate / best:.2f} of the best bare loop"
    if count == 1:
        ratio = f"{rate / single:.2f} of one bare loop at batch 1, {p50 - 1e3 / single:+.1f} ms"
    print(
        f"  served, {count:2} connections: {rate:6.1f} images/s = {ratio}; "
        f"p50 {p50:.1f} p99 {p99:.1f} ms, {failures} failed"
    )


class _bare_process:
    """Runs the bare loop in a separate process, so that it has an interpreter to itself."""

    def __init__(self, model: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve_bare, args=(model, theirs), daemon=True)

    def __enter__(self) -> Any:
        self._process.start()
        self._ours.recv()
        return self._measure

    def __exit__(self, *_: object) -> None:
        self._process.kill()

    def _measure(self, settings: dict[str, Any]) -> float:
        self._ours.send(settings)
        rate: float = self._ours.recv()
        return rate


def _serve_bare(name: str, pipe: Connection) -> None:
    keep_freed_memory()
    from benchmarks.bare import bare_rate
    from models import Registry
    from service.worker.runner import use_threads

    use_threads(1)  # so that a loop's pool of OpenMP threads is the only one, which is fastest
    model = Registry.from_catalog("demo").get(name)
    photos = jpegs()
    bare_rate(model, photos, workers=1, threads=2, batch=1, seconds=2)
    pipe.send(None)
    while True:
        pipe.send(bare_rate(model, photos, **pipe.recv()))


if __name__ == "__main__":
    main()
