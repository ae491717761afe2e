"""Refuses requests at little cost while the event loop is behind.

A refusal by the application takes routing, admission and an answer. With ten times the requests
that a server can do, refusals alone would make the turns of the loop so long that nothing is
answered in time. An access log line would make a refusal a third dearer, so there is one line a
second for all of them.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from service.errors import QueueFullError
from service.gateway.loop_turns import LoopTurns
from service.gateway.refused import problem
from service.holdings import Holdings
from service.logs import choose_request_id
from service.metrics import Metrics

logger = logging.getLogger(__name__)

# Processor time of the loop's thread in one turn beyond which it is behind: that of some 70
# refusals.
MAX_WORK_S = 0.02
# The requests of so few connections cannot make the turns long for more than a moment.
FEW_CONNECTIONS = 256
# How long a queue counts as full after a request was refused for it. A loop that is behind while
# all queues have places is busy with what it can do.
FULL_S = 1.0

LOG_S = 1.0  # between two log lines

_PROBLEM = problem(QueueFullError, "too many requests at once")


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
        self._unlogged = 0

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
        """An ASGI application that answers 429."""
        self._count()
        sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = choose_request_id(sent.decode("latin-1"))
        body = b'%s, "request_id": %s}' % (_PROBLEM[:-1], json.dumps(request_id).encode())
        headers = [
            (b"content-type", b"application/problem+json"),
            (b"content-length", b"%d" % len(body)),
            (b"retry-after", b"1"),
            (b"x-request-id", request_id.encode()),
        ]
        status = QueueFullError.status
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _count(self) -> None:
        self._metrics.shed.inc()
        if not self._unlogged:
            asyncio.get_running_loop().call_later(LOG_S, self._log)
        self._unlogged += 1

    def _log(self) -> None:
        count, self._unlogged = self._unlogged, 0
        logger.warning(
            "too many requests at once: %d were refused unread", count, extra={"count": count}
        )
