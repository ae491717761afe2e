"""The steps of a request in a worker: places in the queues, decoding, trunk passes, results."""

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor

from models.inputs.images import ImageLimits
from models.inputs.types import Input, modality_of
from service.errors import QueueFullError, ServiceError, UnavailableError
from service.metrics import Metrics
from service.types import ImageResult
from service.worker.batcher import Batcher
from service.worker.execution_plan import ExecutionPlan
from service.worker.outbox import Outbox
from service.worker.request_run import RequestRun, Shared
from service.worker.scheduler import QueueFull

logger = logging.getLogger(__name__)


class Pipeline:
    """Runs requests: each input is decoded in the pool and computed in the lanes. The event loop
    sees a request when it starts and when all of its results are there."""

    def __init__(
        self,
        batcher: Batcher,
        metrics: Metrics,
        pool: Executor,
        pool_size: int,
        limits: ImageLimits,
    ) -> None:
        """
        Args:
            pool: decodes inputs, and runs what heads finish slowly.
            pool_size: how many inputs of one request are decoded at a time, so that a small request
                does not wait until a large one is decoded.
        """
        self._batcher = batcher
        self._metrics = metrics
        self._pool = pool
        self._pool_size = pool_size
        self._limits = limits
        self._outbox: Outbox | None = None

    async def run(
        self,
        plans: Mapping[str, ExecutionPlan],
        inputs: Sequence[Input],
        *,
        deadline: float = math.inf,
        bulk: bool = False,
    ) -> list[ImageResult]:
        """The results for all inputs, in order. Cancelling drops the inputs that still wait.

        Args:
            plans: by modality.
            deadline: in `time.monotonic` seconds. Inputs without a result by then get an error.
            bulk: waits behind interactive requests.

        Raises:
            ServiceError: a queue is full, or its trunk is being unloaded. Nothing has run.
        """
        self._admit(plans, inputs)
        if self._outbox is None:
            self._outbox = Outbox(asyncio.get_running_loop())
        shared = Shared(self._batcher, self._metrics, self._pool, self._limits, self._outbox)
        run = RequestRun(shared, plans, inputs, deadline=deadline, bulk=bulk)
        try:
            async with until(deadline):
                await run.start(self._pool_size)
        except TimeoutError:
            pass
        finally:
            run.end()
        return run.results()

    def _admit(self, plans: Mapping[str, ExecutionPlan], inputs: Sequence[Input]) -> None:
        """Reserve a place for every input in the queue of each of its passes, or none at all."""
        admitted: list[tuple[str, int]] = []
        for modality, plan in plans.items():
            count = sum(modality_of(item) == modality for item in inputs)
            for trunk_pass in plan.passes:
                try:
                    self._batcher.admit(trunk_pass.name, count)
                except (QueueFull, KeyError) as error:
                    for trunk, places in admitted:
                        self._batcher.release(trunk, places)
                    raise self._refusal(trunk_pass.name, error) from error
                admitted.append((trunk_pass.name, count))

    def _refusal(self, trunk: str, error: Exception) -> ServiceError:
        if isinstance(error, KeyError):
            return UnavailableError("the model is being unloaded", retry_after_s=1)
        wait_s = max(1.0, self._batcher.queue_seconds())
        return QueueFullError(f"{trunk}: {error}", retry_after_s=wait_s)


def until(deadline: float) -> asyncio.Timeout:
    """A timeout at a deadline in `time.monotonic` seconds, which may be infinite."""
    return asyncio.timeout(None if deadline == math.inf else deadline - time.monotonic())
