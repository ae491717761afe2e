"""The heads' second step: one input's rows, back from the device, to what its caller gets."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any

import numpy as np
from PIL import Image

from models.errors import InputError, ModelsError
from models.inputs.images import ImageLimits
from models.inputs.prepare import decode
from models.inputs.types import Input
from service.errors import InternalError, ServiceError, from_library
from service.metrics import Metrics
from service.types import ImageResult, Timing
from service.worker.execution_plan import Resolved, Way
from service.worker.runner import ItemResult, Row

logger = logging.getLogger(__name__)


class Finisher:
    """`in_pool` runs what is slow off the event loop."""

    def __init__(
        self, metrics: Metrics, in_pool: Callable[..., Awaitable[Any]], limits: ImageLimits
    ) -> None:
        self._metrics = metrics
        self._in_pool = in_pool
        self._limits = limits

    async def finish(
        self,
        way: Way,
        results: Sequence[Sequence[ItemResult]],
        given: Input,
        size: tuple[int, int],
        decode_s: float,
    ) -> ImageResult:
        """The answer for one input, of all calls on it; `results` of each pass has one for each
        piece of the input, `size` is its own (width, height)."""
        resolved, passes = way.resolved, way.passes
        outputs: list[Any] = [None] * len(resolved)
        for plan, pieces in zip(passes, results, strict=True):
            for position, rows in zip(
                plan.positions, zip(*(piece.rows for piece in pieces), strict=True), strict=True
            ):
                started = monotonic()
                outputs[position] = await self._finish_one(resolved[position], rows, given, size)
                spent_s = monotonic() - started
                self._metrics.stage_duration.labels("postprocess", plan.trunk).observe(spent_s)
        failed = [output for output in outputs if isinstance(output, ServiceError)]
        every = [piece for pieces in results for piece in pieces]
        slowest = max(every, key=lambda result: result.queue_s + result.compute_s)
        stages_ms = (decode_s * 1e3, slowest.queue_s * 1e3, slowest.compute_s * 1e3)
        timing = Timing(*stages_ms, slowest.batch_size)
        if len(failed) == len(outputs):
            return ImageResult(error=failed[0], timing=timing)
        return ImageResult(outputs, timing=timing)

    async def _finish_one(
        self,
        call: Resolved,
        rows: Sequence[Row | Exception],
        given: Input,
        size: tuple[int, int],
    ) -> dict[str, np.ndarray] | ServiceError:
        whole = [row for row in rows if not isinstance(row, Exception)]
        if len(whole) < len(rows):
            [error, *_] = [row for row in rows if isinstance(row, Exception)]
            logger.error("model %s failed", call.model.name, exc_info=error)
            return InternalError("the model failed on this image")
        try:
            if call.head.finish_is_slow:
                finished: dict[str, np.ndarray] = await self._in_pool(
                    self._finish_now, call, whole, given, size
                )
                return finished
            return self._finish_now(call, whole, given, size)
        except ModelsError as error:
            return from_library(error)
        except Exception:
            logger.exception("model %s failed to finish", call.model.name)
            return InternalError("the model failed on this image")

    def _finish_now(
        self, call: Resolved, rows: Sequence[Row], given: Input, size: tuple[int, int]
    ) -> dict[str, np.ndarray]:
        options = call.finish_options
        if call.head.sees_image(options):
            # decoded once more, rather than kept while it waited
            image = decode(given, self._limits)
            if not isinstance(image, Image.Image):
                raise InputError("an overlay needs an encoded image", field="output")
            options = {**options, "image": image}
        view = call.head.view
        row = rows[0] if view is None or not isinstance(given, bytes) else view.merge(rows, size)
        return call.head.finish(row, size, **options)
