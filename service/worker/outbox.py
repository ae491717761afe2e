"""Results from other threads to the event loop, many with one wake-up."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any


class Outbox:
    """Calls functions on the event loop. Waking the loop is a system call, and a chance for other
    threads to take the interpreter, so results that come together share one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._is_waking = False

    def post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have the loop call a function. May be called from any thread."""
        self._posted.append((function, arguments))
        if not self._is_waking:
            self._is_waking = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_waking = False  # what is posted from now on wakes the loop again
        while self._posted:
            function, arguments = self._posted.popleft()
            function(*arguments)
