"""Results from other threads reach the event loop in order, many with one wake-up."""

import asyncio
from collections.abc import Callable
from typing import Any

from service.worker.outbox import Outbox


class CountingLoop:
    """Stands in front of a loop and counts how often it is woken."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.wakes = 0

    def call_soon_threadsafe(self, function: Callable[[], None]) -> None:
        self.wakes += 1
        self._loop.call_soon_threadsafe(function)


def test_a_batch_of_results_is_one_wake_up() -> None:
    async def run() -> tuple[list[int], int]:
        loop: Any = CountingLoop(asyncio.get_running_loop())
        outbox = Outbox(loop)
        arrived: list[int] = []
        for number in range(16):
            outbox.post(arrived.append, number)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return arrived, loop.wakes

    assert asyncio.run(run()) == (list(range(16)), 1)


def test_nothing_posted_by_many_threads_is_lost() -> None:
    async def run() -> list[tuple[int, int]]:
        outbox = Outbox(asyncio.get_running_loop())
        arrived: list[tuple[int, int]] = []

        def post(thread: int) -> None:
            for number in range(500):
                outbox.post(arrived.append, (thread, number))

        await asyncio.gather(*(asyncio.to_thread(post, each) for each in range(4)))
        await asyncio.sleep(0.1)  # until the loop has called what was posted last
        return arrived

    arrived = asyncio.run(run())
    for thread in range(4):
        assert [number for each, number in arrived if each == thread] == list(range(500))
