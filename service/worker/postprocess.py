"""The heads' second step: an input's rows from the device to its results, on the CPU."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any

import numpy as np

from models.errors import ModelsError
from models.inference import Row, finish
from models.inputs.images import ImageLimits
from models.inputs.types import Input
from service.errors import InternalError, ServiceError, from_library
from service.metrics import Metrics
from service.types import ImageResult, Timing
from service.worker.execution_plan import ExecutionPlan, ResolvedCall
from service.worker.runner import ItemResult

logger = logging.getLogger(__name__)


class Postprocessor:
    """Runs `finish` of each head on an input's rows."""

    def __init__(
        self, metrics: Metrics, in_pool: Callable[..., Awaitable[Any]], limits: ImageLimits
    ) -> None:
        """
        Args:
            in_pool: runs a function in the decode pool, off the event loop.
        """
        self._metrics = metrics
        self._in_pool = in_pool
        self._limits = limits

    async def run(
        self,
        plan: ExecutionPlan,
        results: Sequence[Sequence[ItemResult]],
        item: Input,
        size: tuple[int, int],
        decode_s: float,
    ) -> ImageResult:
        """The results of all calls for one input.

        Args:
            results: for each pass, the results of the input's pieces.
            size: an image's (width, height).
        """
        outputs: list[Any] = [None] * len(plan.calls)
        for trunk_pass, pieces in zip(plan.passes, results, strict=True):
            rows_by_call = zip(*(piece.rows for piece in pieces), strict=True)
            for position, rows in zip(trunk_pass.positions, rows_by_call, strict=True):
                started = monotonic()
                outputs[position] = await self._finish(plan.calls[position], rows, item, size)
                spent_s = monotonic() - started
                self._metrics.stage_duration.labels("postprocess", trunk_pass.name).observe(spent_s)
        failed = [output for output in outputs if isinstance(output, ServiceError)]
        timing = _timing([piece for pieces in results for piece in pieces], decode_s)
        if len(failed) == len(outputs):
            return ImageResult(error=failed[0], timing=timing)
        return ImageResult(outputs, timing=timing)

    async def _finish(
        self,
        call: ResolvedCall,
        rows: Sequence[Row | Exception],
        item: Input,
        size: tuple[int, int],
    ) -> dict[str, np.ndarray] | ServiceError:
        for row in rows:
            if isinstance(row, Exception):
                logger.error("model %s failed", call.model.name, exc_info=row)
                return InternalError("the model failed on this image")
        arguments = (call.head, rows, call.finish_options, item, size, self._limits)
        try:
            if call.head.finish_is_slow:
                finished: dict[str, np.ndarray] = await self._in_pool(finish, *arguments)
                return finished
            return finish(*arguments)  # type: ignore[arg-type]  # rows hold no exceptions here
        except ModelsError as error:
            return from_library(error)
        except Exception:
            logger.exception("model %s failed to finish", call.model.name)
            return InternalError("the model failed on this image")


def _timing(pieces: Sequence[ItemResult], decode_s: float) -> Timing:
    """The timing of the slowest piece."""
    slowest = max(pieces, key=lambda piece: piece.queue_s + piece.compute_s)
    milliseconds = (decode_s * 1e3, slowest.queue_s * 1e3, slowest.compute_s * 1e3)
    return Timing(*milliseconds, slowest.batch_size)
