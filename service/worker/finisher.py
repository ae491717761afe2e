"""The heads' second step: one input's rows, back from the device, to what its caller gets."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any

import numpy as np

from models.errors import ModelsError
from service.errors import InternalError, ServiceError, from_library
from service.metrics import Metrics
from service.types import ImageResult, Timing
from service.worker.plan import Resolved, Way
from service.worker.runner import ItemResult

logger = logging.getLogger(__name__)


class Finisher:
    """`in_pool` runs what is slow off the event loop."""

    def __init__(self, metrics: Metrics, in_pool: Callable[..., Awaitable[Any]]) -> None:
        self._metrics = metrics
        self._in_pool = in_pool

    async def finish(
        self,
        way: Way,
        results: Sequence[ItemResult],
        size: tuple[int, int],
        decode_s: float,
    ) -> ImageResult:
        """The answer for one input, of all calls on it; `size` is its own (width, height)."""
        resolved, passes = way.resolved, way.passes
        outputs: list[Any] = [None] * len(resolved)
        for plan, result in zip(passes, results, strict=True):
            for position, row in zip(plan.positions, result.rows, strict=True):
                started = monotonic()
                outputs[position] = await self._finish_one(resolved[position], row, size)
                spent_s = monotonic() - started
                self._metrics.stage_duration.labels("postprocess", plan.trunk).observe(spent_s)
        failed = [output for output in outputs if isinstance(output, ServiceError)]
        slowest = max(results, key=lambda result: result.queue_s + result.compute_s)
        stages_ms = (decode_s * 1e3, slowest.queue_s * 1e3, slowest.compute_s * 1e3)
        timing = Timing(*stages_ms, slowest.batch_size)
        if len(failed) == len(outputs):
            return ImageResult(error=failed[0], timing=timing)
        return ImageResult(outputs, timing=timing)

    async def _finish_one(
        self, call: Resolved, row: dict[str, np.ndarray] | Exception, size: tuple[int, int]
    ) -> dict[str, np.ndarray] | ServiceError:
        if isinstance(row, Exception):
            logger.error("model %s failed", call.model.name, exc_info=row)
            return InternalError("the model failed on this image")
        try:
            if call.head.finish_is_slow:
                finish = partial(call.head.finish, row, size, **call.finish_options)
                finished: dict[str, np.ndarray] = await self._in_pool(finish)
                return finished
            return call.head.finish(row, size, **call.finish_options)
        except ModelsError as error:
            return from_library(error)
        except Exception:
            logger.exception("model %s failed to finish", call.model.name)
            return InternalError("the model failed on this image")
