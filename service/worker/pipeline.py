"""An input's way through the queues: a place, decoding, its trunks' passes, and the answer."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from models.errors import ModelsError
from models.inputs.images import ImageLimits
from models.inputs.types import Input, modality_of
from service.errors import (
    DeadlineExceededError,
    InternalError,
    QueueFullError,
    ServiceError,
    UnavailableError,
    from_library,
)
from service.metrics import Metrics
from service.types import ImageResult, InferRequest
from service.worker.batcher import Batcher
from service.worker.execution_plan import TrunkPass, Way, prepare_all
from service.worker.postprocess import Finisher
from service.worker.runner import Item
from service.worker.scheduler import Entry, QueueFull

logger = logging.getLogger(__name__)


class Inputs:
    """`in_pool` runs what decodes off the event loop."""

    def __init__(
        self,
        batcher: Batcher,
        finisher: Finisher,
        metrics: Metrics,
        in_pool: Callable[..., Awaitable[Any]],
        limits: ImageLimits,
    ) -> None:
        self._batcher = batcher
        self._finisher = finisher
        self._metrics = metrics
        self._in_pool = in_pool
        self._limits = limits

    def admit(self, ways: Mapping[str, Way], inputs: Sequence[Input]) -> None:
        """Take places for every input in every trunk's queue, or none at all."""
        admitted: list[tuple[str, int]] = []
        for modality, way in ways.items():
            count = sum(modality_of(item) == modality for item in inputs)
            for plan in way.passes:
                try:
                    self._batcher.admit(plan.trunk, count)
                except (QueueFull, KeyError) as error:
                    for trunk, places in admitted:
                        self._batcher.release(trunk, places)
                    raise self._refusal(plan.trunk, error) from error
                admitted.append((plan.trunk, count))

    def _refusal(self, trunk: str, error: Exception) -> ServiceError:
        if isinstance(error, KeyError):
            return UnavailableError("the model is being unloaded", retry_after_s=1)
        wait_s = max(1.0, self._batcher.queue_seconds())
        return QueueFullError(f"{trunk}: {error}", retry_after_s=wait_s)

    async def infer(
        self,
        given: Input,
        way: Way,
        request: InferRequest,
        flow: object,
        turn: asyncio.Semaphore,
    ) -> ImageResult:
        groups: list[list[Entry]] = []
        passes = way.passes
        try:
            async with until(request.deadline):
                async with turn:
                    started = time.monotonic()
                    prepared, size = await self._in_pool(prepare_all, given, passes, self._limits)
                    decode_s = time.monotonic() - started
                for plan, pieces in zip(passes, prepared, strict=True):
                    calls = [call.at_size(size) for call in plan.calls]
                    groups.append([])
                    for number, piece in enumerate(pieces):
                        if number:  # there is a place for the first one already
                            await self._wait_for_place(plan)
                        entry = Entry(
                            Item(plan.trunk, piece, calls), flow, request.bulk, request.deadline
                        )
                        groups[-1].append(entry)
                        self._batcher.put(plan.trunk, entry)
                    self._metrics.stage_duration.labels("decode", plan.trunk).observe(decode_s)
                results = [
                    [await asyncio.wrap_future(entry.payload.future) for entry in group]
                    for group in groups
                ]
                return await self._finisher.finish(way, results, given, size, decode_s)
        except TimeoutError:
            return ImageResult(error=DeadlineExceededError("the deadline passed before the answer"))
        except ModelsError as error:
            return ImageResult(error=from_library(error))
        except ServiceError as error:
            return ImageResult(error=error)
        except Exception:
            logger.exception("an input failed")
            return ImageResult(error=InternalError("the input could not be processed"))
        finally:
            for entry in itertools.chain(*groups):
                entry.cancelled = True  # harmless once answered; else it is dropped unrun
            for plan in passes[len(groups) :]:
                self._batcher.release(plan.trunk, 1)

    async def _wait_for_place(self, plan: TrunkPass) -> None:
        """A place in the queue for one more piece of an image that was let in."""
        while True:
            try:
                return self._batcher.admit(plan.trunk, 1)
            except QueueFull:
                await asyncio.sleep(0.02)
            except KeyError as error:
                raise self._refusal(plan.trunk, error) from error


def until(deadline: float) -> asyncio.Timeout:
    """A timeout at a `time.monotonic` moment, which may be infinite."""
    return asyncio.timeout(None if deadline == math.inf else deadline - time.monotonic())
