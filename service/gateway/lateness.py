"""How late answers come.

Requests are admitted by their predicted finish, which does not know of everything: the event loop
may be busy when an answer is ready, and other programs use the processors, too. If answers come
after their deadlines, the deadlines of further requests are set earlier, until no answer is late.
"""

import math
import time
from collections.abc import Callable

# What each late answer adds to the reserve, in seconds.
STEP_S = 0.004
# The reserve falls to a third in this time if no answer is late.
DECAY_S = 10.0
MAX_RESERVE_S = 1.0
# The most of a request's time that is kept in reserve.
MAX_SHARE = 0.25


class Lateness:
    """Keeps a reserve of time that deadlines are set earlier by."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reserve_s = 0.0
        self._at = clock()

    def answered(self, deadline: float) -> None:
        """Note that an answer is sent, and whether it is late.

        Args:
            deadline: the client's, in seconds of the clock.
        """
        now = self._clock()
        if now > deadline:
            self._reserve_s = min(self._decayed(now) + STEP_S, MAX_RESERVE_S)
            self._at = now

    def reserve_s(self, timeout_s: float) -> float:
        """By how many seconds the deadline of a request comes earlier than its client's."""
        return min(self._decayed(self._clock()), MAX_SHARE * timeout_s)

    def _decayed(self, now: float) -> float:
        return self._reserve_s * math.exp((self._at - now) / DECAY_S)
