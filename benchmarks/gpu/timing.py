"""How long passes take on a device that works while the host goes on."""

import time
from collections.abc import Callable

import torch

from benchmarks.gpu.options import Options


@torch.inference_mode()
def rate_of(options: Options, run: Callable[[], object], batch: int) -> float:
    """Images per second, with the device never waiting for the host."""
    for _ in range(3):
        run()
    options.wait()
    started, passes = time.perf_counter(), 0
    while time.perf_counter() - started < options.seconds:
        run()
        passes += 1
        if passes % 8 == 0:
            options.wait()  # else seconds of work would be queued
    options.wait()
    return passes * batch / (time.perf_counter() - started)


@torch.inference_mode()
def durations_of(options: Options, run: Callable[[], object]) -> list[float]:
    """Seconds of single runs, each until the device has done it."""
    durations: list[float] = []
    end = time.perf_counter() + options.seconds
    while not durations or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        options.wait()
        durations.append(time.perf_counter() - started)
    return durations
