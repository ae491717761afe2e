"""Refuses requests at little cost while the event loop is behind.

A refusal by the application takes routing, admission and an answer. With ten times the requests
that a server can do, refusals alone would make the turns of the loop so long that nothing is
answered in time.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any

from service.errors import UnavailableError
from service.gateway.loop_turns import LoopTurns
from service.gateway.refused import problem
from service.holdings import Holdings
from service.metrics import Metrics

# Processor time of the loop's thread in one turn beyond which it is behind: that of some 70
# refusals.
MAX_WORK_S = 0.02
# The requests of so few connections cannot make the turns long for more than a moment.
FEW_CONNECTIONS = 256
# How long a queue counts as full after a request was refused for it. A loop that is behind while
# all queues have places is busy with what it can do.
FULL_S = 1.0

_PROBLEM = problem("too many requests at once")
_HEADERS = [
    (b"content-type", b"application/problem+json"),
    (b"content-length", b"%d" % len(_PROBLEM)),
    (b"retry-after", b"1"),
]


class Shedding:
    """Chooses the requests that are refused."""

    def __init__(self, held: Holdings, turns: LoopTurns, metrics: Metrics) -> None:
        """
        Args:
            held: the connections of each client.
        """
        self._held = held
        self._turns = turns
        self._metrics = metrics

    def sheds(self, method: str, client: str) -> bool:
        """Whether a request is refused: queues are full, the loop is behind, and the client has at
        least the average number of connections. Health and metrics are answered in any case."""
        return (
            method == "POST"
            and self._held.taken > FEW_CONNECTIONS
            and self._turns.work_s() > MAX_WORK_S
            and time.monotonic() - self._metrics.queue_full_at < FULL_S
            and self._held.has_share(client)
        )

    async def refuse(
        self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]
    ) -> None:
        """An ASGI application that answers 503."""
        self._metrics.shed.inc()
        status = UnavailableError.status
        await send({"type": "http.response.start", "status": status, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": _PROBLEM})
