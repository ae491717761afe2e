"""What is sampled of a process twice a second: the requests in flight, and how late its event loop
is. Whatever stops the loop delays every request of the process. And large bodies' memory is given
back."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.allocator import return_freed_memory
from service.limits import PROTOCOLS, Budget
from service.metrics import Metrics

INTERVAL_S = 0.5
# Once requests have held so many bytes and hold few, the memory is given back, not more often than
# every so many seconds: see `allocator.py`.
LARGE_BYTES = 48 * 2**20
RETURN_INTERVAL_S = 10.0


@asynccontextmanager
async def sampling(metrics: Metrics, budget: Budget) -> AsyncIterator[None]:
    """A context in which samples are taken."""
    task = asyncio.create_task(_sample(metrics, budget))
    try:
        yield
    finally:
        task.cancel()


async def _sample(metrics: Metrics, budget: Budget) -> None:
    returned = -RETURN_INTERVAL_S
    while True:
        for protocol in PROTOCOLS:
            metrics.in_flight.labels(protocol).set(budget.by_protocol[protocol])
        metrics.bytes_in_flight.set(budget.bytes)
        started = time.monotonic()
        await asyncio.sleep(INTERVAL_S)
        # how much later than asked the sleep ended
        metrics.loop_lag.observe(max(0.0, time.monotonic() - started - INTERVAL_S))
        was_large = budget.peak_bytes > LARGE_BYTES > 4 * budget.bytes
        if was_large and time.monotonic() > returned + RETURN_INTERVAL_S:
            await asyncio.to_thread(return_freed_memory)
            returned, budget.peak_bytes = time.monotonic(), budget.bytes
