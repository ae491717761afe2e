"""How long a turn of the event loop takes now, which is how long a request may have waited in the
kernel before the loop read it.

A loop that has more to do than it can takes long turns. A request's deadline would pass unseen in
that time, and the server would work for answers that come too late.
"""

import asyncio
import time
from collections.abc import Callable


class LoopTurns:
    """Measures a turn of the loop whenever something is received, one at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_measuring = False
        self._ended = 0.0
        self._seconds = 0.0

    def received(self, loop: asyncio.AbstractEventLoop) -> None:
        """Measure the turn that begins now, unless one is being measured."""
        if not self._is_measuring:
            self._is_measuring = True
            loop.call_soon(self._begin, loop)

    def seconds(self) -> float:
        """The length of the last turn; 0 if it ended longer ago than it took."""
        return self._seconds if self._clock() - self._ended <= self._seconds else 0.0

    def _begin(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_soon(self._end, self._clock())

    def _end(self, began: float) -> None:
        self._ended = self._clock()
        self._seconds = self._ended - began
        self._is_measuring = False
