"""How late the event loop is: whatever stops it delays every request of the process."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.metrics import Metrics

INTERVAL_S = 0.5


@asynccontextmanager
async def measuring_lag(metrics: Metrics) -> AsyncIterator[None]:
    """A context in which the lag is measured: how much later than asked a sleep ends."""
    task = asyncio.create_task(_measure(metrics))
    try:
        yield
    finally:
        task.cancel()


async def _measure(metrics: Metrics) -> None:
    while True:
        started = time.monotonic()
        await asyncio.sleep(INTERVAL_S)
        metrics.loop_lag.observe(max(0.0, time.monotonic() - started - INTERVAL_S))
