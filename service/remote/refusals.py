"""What workers have refused just now, so that a gateway need not send them more of it.

A gateway does not know its workers' queues. A worker that refuses one image would refuse the next
one, too, until its queue has become shorter: for a while that is small against the wait in it.
"""

import time
from collections.abc import Callable, Mapping

from models.description import ModelDescription
from service.clients import client
from service.errors import QueueFullError
from service.types import InferRequest

# How long a refusal holds: this share of the wait that it tells of, and at most so many seconds.
SHARE = 0.1
MAX_S = 0.25
# A request may have so much more time left than the refused one, part of whose time was spent when
# it was sent.
SLACK = 1.1
# Clients whose refusals are kept.
MAX_KEPT = 1024


class Refusals:
    """The latest refusals of one worker, by trunk, client and priority."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # When it ends, the seconds that the refused request had left, and the error.
        self._latest: dict[tuple[str, str, bool], tuple[float, float, QueueFullError]] = {}

    def add(
        self,
        request: InferRequest,
        models: Mapping[str, ModelDescription],
        remaining_s: float,
        error: QueueFullError,
    ) -> None:
        """Remember that an image was refused. Where several were, one might have a place.

        Args:
            models: the worker's.
            remaining_s: seconds to the request's deadline when it was sent.
        """
        if len(request.inputs) != 1 or len(request.calls) != 1:
            return
        model = models.get(request.calls[0].model or "")
        if model is None or not isinstance(request.inputs[0], bytes):
            return
        if len(self._latest) >= MAX_KEPT:
            self._latest.clear()
        wait_s = min(remaining_s, error.retry_after_s or 0.0)
        until = self._clock() + min(SHARE * wait_s, MAX_S)
        self._latest[model.trunk, client.get(), request.bulk] = until, remaining_s, error

    def find(self, trunk: str, *, bulk: bool, remaining_s: float) -> QueueFullError | None:
        """The error that a further image of the client would get, if it is known.

        Args:
            remaining_s: seconds to its deadline.
        """
        until, refused_s, error = self._latest.get((trunk, client.get(), bulk), (0.0, 0.0, None))
        if error is None or remaining_s > refused_s * SLACK or self._clock() >= until:
            return None
        return QueueFullError(
            f"another image was refused just now: {error.detail}",
            retry_after_s=error.retry_after_s,
        )
