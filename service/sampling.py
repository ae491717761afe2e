"""What is sampled of a process twice a second: the requests in flight, and how late its event loop
is. Whatever stops the loop delays every request of the process."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.limits import PROTOCOLS, Budget
from service.metrics import Metrics

INTERVAL_S = 0.5


@asynccontextmanager
async def sampling(metrics: Metrics, budget: Budget) -> AsyncIterator[None]:
    """A context in which samples are taken."""
    task = asyncio.create_task(_sample(metrics, budget))
    try:
        yield
    finally:
        task.cancel()


async def _sample(metrics: Metrics, budget: Budget) -> None:
    while True:
        for protocol in PROTOCOLS:
            metrics.in_flight.labels(protocol).set(budget.by_protocol[protocol])
        metrics.bytes_in_flight.set(budget.bytes)
        started = time.monotonic()
        await asyncio.sleep(INTERVAL_S)
        # how much later than asked the sleep ended
        metrics.loop_lag.observe(max(0.0, time.monotonic() - started - INTERVAL_S))
