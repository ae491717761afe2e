"""Which signals end a process's waiting for its accepted requests."""

import time
from collections.abc import Callable

# One stop may send two signals: an init sends its own to all processes, and then the supervisor
# sends one to each of its children.
SAME_STOP_S = 1.0


class StopSignals:
    """Tells a second request to stop from the first one, which may come as several signals."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: float | None = None

    def is_second(self) -> bool:
        """Note a signal; whether it comes more than `SAME_STOP_S` seconds after the first one."""
        now = self._clock()
        if self._first is None:
            self._first = now
        return now > self._first + SAME_STOP_S
