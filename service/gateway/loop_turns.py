"""How long a turn of the event loop takes now, which is how long a request may have waited in the
kernel before the loop read it.

A loop that has more to do than it can takes long turns. A request's deadline would pass unseen in
that time, and the server would work for answers that come too late.
"""

import asyncio
import time
from collections.abc import Callable

# How long the work of the last turn counts where no further turn is measured.
REMEMBERED_S = 1.0


class LoopTurns:
    """Measures a turn of the loop whenever something is received, one at a time."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        thread_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._clock = clock
        self._thread_clock = thread_clock
        self._is_measuring = False
        self._ended = 0.0
        self._seconds = 0.0
        self._work_s = 0.0

    def received(self, loop: asyncio.AbstractEventLoop) -> None:
        """Measure the turn that begins now, unless one is being measured."""
        if not self._is_measuring:
            self._is_measuring = True
            loop.call_soon(self._begin, loop)

    def seconds(self) -> float:
        """The length of the last turn; 0 if it ended longer ago than it took."""
        return self._seconds if self._clock() - self._ended <= self._seconds else 0.0

    def work_s(self) -> float:
        """The processor time of the loop's thread in the last turn, without pauses that other
        threads cause; 0 if it ended more than a second ago."""
        return self._work_s if self._clock() - self._ended <= REMEMBERED_S else 0.0

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_soon(self._end, self._clock(), self._thread_clock())

    def _end(self, began: float, work_began: float) -> None:
        self._ended = self._clock()
        self._work_s = self._thread_clock() - work_began
        self._seconds = self._ended - began
        self._is_measuring = False
