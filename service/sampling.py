"""What is sampled of a process twice a second: the requests in flight, and how late its event loop
is. Whatever stops the loop delays every request of the process. And large bodies' memory is given
back when the process is idle."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.allocator import return_freed_memory
from service.limits import PROTOCOLS, Budget
from service.metrics import Metrics

INTERVAL_S = 0.5
# Once requests have held so many bytes and none has been in flight at so many samples in a row, the
# memory is given back, not more often than every so many seconds. All threads wait meanwhile, and
# the next pass of a network pays for each page again: see `allocator.py`.
LARGE_BYTES = 48 * 2**20
IDLE_SAMPLES = 6
RETURN_INTERVAL_S = 10.0


@asynccontextmanager
async def sampling(metrics: Metrics, budget: Budget) -> AsyncIterator[None]:
    """A context in which samples are taken."""
    task = asyncio.create_task(_sample(metrics, budget))
    try:
        yield
    finally:
        task.cancel()


class MemoryReturn:
    """When the memory of large bodies is to be given back. Asked at each sample."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._idle_samples = 0
        self._returned = -RETURN_INTERVAL_S

    def is_due(self, now: float) -> bool:
        """Whether to give it back now, by a clock of seconds. What was held is then forgotten."""
        is_busy = self._budget.requests > 0 or self._budget.bytes > 0
        self._idle_samples = 0 if is_busy else self._idle_samples + 1
        if (
            self._idle_samples < IDLE_SAMPLES
            or self._budget.peak_bytes <= LARGE_BYTES
            or now < self._returned + RETURN_INTERVAL_S
        ):
            return False
        self._returned, self._budget.peak_bytes = now, 0
        return True


async def _sample(metrics: Metrics, budget: Budget) -> None:
    memory = MemoryReturn(budget)
    while True:
        for protocol in PROTOCOLS:
            metrics.in_flight.labels(protocol).set(budget.by_protocol[protocol])
        metrics.bytes_in_flight.set(budget.bytes)
        started = time.monotonic()
        await asyncio.sleep(INTERVAL_S)
        # how much later than asked the sleep ended
        metrics.loop_lag.observe(max(0.0, time.monotonic() - started - INTERVAL_S))
        if memory.is_due(time.monotonic()):
            await asyncio.to_thread(return_freed_memory)
