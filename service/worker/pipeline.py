"""The steps of a request in a worker: places in the queues, decoding, trunk passes, results."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

from models.inputs.images import ImageLimits
from models.inputs.types import Input
from service.decoding.pool import ImageDecoder
from service.metrics import Metrics
from service.types import ImageResult
from service.worker.admission import Admission, Claim
from service.worker.answer_memory import AnswerMemory
from service.worker.batcher import Batcher
from service.worker.decode_queue import DecodeQueue
from service.worker.execution_plan import ExecutionPlan
from service.worker.outbox import Outbox
from service.worker.request_run import RequestRun, Shared
from service.worker.runner import use_threads


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
        decoder: ImageDecoder,
        answer_bytes: int,
    ) -> None:
        """
        Args:
            pool: prepares inputs, with images from `decoder`.
            pool_size: the threads of one client; the pool has one more.
            answer_bytes: the most bytes of answers in flight.
        """
        self.admission = Admission(batcher, DecodeQueue(pool, pool_size), metrics)
        self._metrics = metrics
        # Apart from those that decode, which would wait for masks of many megapixels.
        self._finishers = ThreadPoolExecutor(pool_size, "finish", partial(use_threads, 1))
        self._limits = limits
        self._decoder = decoder
        self._answers = AnswerMemory(answer_bytes)
        self._outbox: Outbox | None = None

    def close(self) -> None:
        """Wait for what is being finished."""
        self._finishers.shutdown()

    async def run(
        self,
        plans: Mapping[str, ExecutionPlan],
        inputs: Sequence[Input],
        claim: Claim,
    ) -> list[ImageResult]:
        """The results for all inputs, in order. Cancelling drops the inputs that still wait.

        Args:
            plans: by modality.
            claim: inputs without a result by its deadline get an error.

        Raises:
            ServiceError: a queue is full, the request would be late, or a trunk is being unloaded.
                Nothing has run.
        """
        self.admission.admit(plans, inputs, claim)
        if self._outbox is None:
            self._outbox = Outbox(asyncio.get_running_loop())
        shared = Shared(
            self.admission.batcher, self.admission, self._metrics, self._finishers, self._limits,
            self._decoder, self._outbox, self._answers,
        )  # fmt: skip
        run = RequestRun(shared, plans, inputs, claim)
        try:
            async with until(claim.deadline):
                await run.start()
        except TimeoutError:
            run.expire()
        finally:
            run.end()
        return run.results()


def until(deadline: float) -> asyncio.Timeout:
    """A timeout at a deadline in `time.monotonic` seconds, which may be infinite."""
    return asyncio.timeout(None if deadline == math.inf else deadline - time.monotonic())
