"""Checks that trunks work: passes of blank inputs, before they serve and while they are idle."""

import asyncio
import logging
import time
from collections.abc import Mapping

from models.errors import CheckpointError
from service.errors import ServiceError
from service.worker.batch_queue import Entry
from service.worker.batcher import Batcher
from service.worker.places import QueueFull
from service.worker.runner import Runner

logger = logging.getLogger(__name__)


class Prober:
    """Runs a blank input through every trunk that has been idle for a while.

    A trunk that is in use is not probed: each of its passes shows that it works.
    """

    def __init__(
        self, batcher: Batcher, runners: Mapping[str, Runner], *, interval_s: float, limit_s: float
    ) -> None:
        """
        Args:
            interval_s: seconds since a trunk's last pass after which it is probed.
            limit_s: seconds in which a probe must succeed.
        """
        self._batcher = batcher
        self._runners = runners
        self._interval_s = interval_s
        self._limit_s = limit_s
        # Trunks whose last probe failed, and why.
        self.failures: dict[str, str] = {}

    def warm_up(self, name: str, largest: int) -> None:
        """Run batches of up to `largest`, which allocates the memory that batches need.

        Raises:
            CheckpointError: a pass failed.
        """
        for size in self._runners[name].trunk.engine.warm_up_sizes(largest):
            blanks = [self._runners[name].blank_item() for _ in range(size)]
            # All at once: else an idle lane takes the first ones alone, and no batch has this size.
            self._batcher.admit(name, 1)
            self._batcher.put(name, [Entry(item, "warm-up") for item, _ in blanks])
            rows = [row for _, future in blanks for row in future.result().rows]
            if failed := next((row for row in rows if isinstance(row, Exception)), None):
                raise CheckpointError(f"the trunk does not run: {failed}") from failed

    async def run(self) -> None:
        """Probe idle trunks until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            for name, runner in list(self._runners.items()):
                if time.monotonic() - runner.last_passed >= self._interval_s:
                    await self._probe(name, runner)

    async def _probe(self, name: str, runner: Runner) -> None:
        item, future = runner.blank_item()
        deadline = time.monotonic() + self._limit_s
        failed: Exception | None
        try:
            self._batcher.admit(name, 1, bulk=True)
            self._batcher.put(name, [Entry(item, "probe", bulk=True, deadline=deadline)])
            async with asyncio.timeout(self._limit_s):
                result = await asyncio.wrap_future(future)
            failed = next((row for row in result.rows if isinstance(row, Exception)), None)
        except (QueueFull, KeyError):  # in use, or unloaded meanwhile
            return
        except (TimeoutError, ServiceError):
            failed = TimeoutError(f"no result within {self._limit_s:g} s")
        if failed is None:
            self.failures.pop(name, None)
        elif self._runners.get(name) is runner:  # not removed meanwhile
            self.failures[name] = f"probe failed: {failed}"
            logger.error("the probe of %s failed: %s", name, failed)
