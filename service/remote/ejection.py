"""Ejects a worker that fails every image of several requests in a row.

It is always idle then, and would otherwise get all requests.
"""

import logging
import time

from service.errors import InternalError
from service.types import InferResult

logger = logging.getLogger(__name__)

EJECTION_S = 5.0
MAX_EJECTION_S = 60.0
FAILURES_TO_EJECT = 3


class Ejection:
    """Whether the last requests of one worker all failed."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._failures = 0
        self._ejections = 0
        self._until = 0.0

    def __bool__(self) -> bool:
        """Whether other workers are preferred for a while."""
        return time.monotonic() < self._until

    def update(self, result: InferResult) -> None:
        """Take account of a request's result."""
        failed = [image for image in result.images if isinstance(image.error, InternalError)]
        if not failed or len(failed) < len(result.images):
            self._failures = self._ejections = 0
            return
        self._failures += 1
        if self._failures >= FAILURES_TO_EJECT and not self:
            ejection_s = min(EJECTION_S * 2**self._ejections, MAX_EJECTION_S)
            self._until = time.monotonic() + ejection_s
            self._ejections += 1
            logger.warning("worker %s keeps failing; ejected for %.0f s", self._address, ejection_s)
