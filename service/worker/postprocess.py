"""The heads' second step: an input's rows from the device to its results, on the CPU."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np

from models.errors import ModelsError
from models.inference import finish
from models.inputs.images import ImageLimits
from models.inputs.types import Input
from models.started_pass import Row
from service.errors import InternalError, ServiceError, from_library
from service.metrics import Metrics
from service.types import ImageResult, Timing
from service.worker.execution_plan import ExecutionPlan, ResolvedCall
from service.worker.runner import ItemResult
from service.worker.trunk_keys import name_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decoded:
    """An input after decoding: its (width, height) if it is an image, and the time it took."""

    item: Input
    size: tuple[int, int]
    decode_s: float


def is_slow(plan: ExecutionPlan) -> bool:
    """Whether finishing takes milliseconds, so that it must not run in a lane."""
    return any(call.head.finish_is_slow for call in plan.calls)


def finish_input(
    plan: ExecutionPlan,
    results: Sequence[Sequence[ItemResult]],
    decoded: Decoded,
    limits: ImageLimits,
    metrics: Metrics,
) -> ImageResult:
    """Run `finish` of each head on an input's rows.

    Args:
        results: for each pass, the results of the input's pieces.
    """
    outputs: list[Any] = [None] * len(plan.calls)
    for trunk_pass, pieces in zip(plan.passes, results, strict=True):
        started = monotonic()
        rows_by_call = zip(*(piece.rows for piece in pieces), strict=True)
        for position, rows in zip(trunk_pass.positions, rows_by_call, strict=True):
            outputs[position] = _finish(plan.calls[position], rows, decoded, limits)
        duration = metrics.stage_duration.labels("postprocess", name_of(trunk_pass.key))
        duration.observe(monotonic() - started)
    failed = [output for output in outputs if isinstance(output, ServiceError)]
    timing = _timing([piece for pieces in results for piece in pieces], decoded.decode_s)
    if len(failed) == len(outputs):
        return ImageResult(error=failed[0], timing=timing)
    return ImageResult(outputs, timing=timing)


def _finish(
    call: ResolvedCall, rows: Sequence[Row | Exception], decoded: Decoded, limits: ImageLimits
) -> dict[str, np.ndarray] | ServiceError:
    for row in rows:
        if isinstance(row, Exception):
            logger.error("model %s failed", call.model.name, exc_info=row)
            return InternalError("the model failed on this image")
    try:
        outputs = finish(
            call.head, rows, call.finish_options, decoded.item, decoded.size, limits  # type: ignore[arg-type]  # rows hold no exceptions here
        )  # fmt: skip
    except ModelsError as error:
        return from_library(error)
    except Exception:
        logger.exception("model %s failed to finish", call.model.name)
        return InternalError("the model failed on this image")
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            logger.error("model %s: %s has values that are not finite", call.model.name, name)
            return InternalError("the model's output has values that are not finite")
    return outputs


def _timing(pieces: Sequence[ItemResult], decode_s: float) -> Timing:
    """The timing of the slowest piece."""
    slowest = max(pieces, key=lambda piece: piece.queue_s + piece.compute_s)
    milliseconds = (decode_s * 1e3, slowest.queue_s * 1e3, slowest.compute_s * 1e3)
    return Timing(*milliseconds, slowest.batch_size)
