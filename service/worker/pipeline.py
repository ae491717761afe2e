"""The steps of an input in a worker: a place in the queue, decoding, trunk passes, the result."""

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
from service.worker.execution_plan import ExecutionPlan, TrunkPass, prepare_all
from service.worker.postprocess import Postprocessor
from service.worker.runner import Item
from service.worker.scheduler import Entry, QueueFull

logger = logging.getLogger(__name__)


class InputPipeline:
    """Takes inputs through the queues."""

    def __init__(
        self,
        batcher: Batcher,
        postprocessor: Postprocessor,
        metrics: Metrics,
        in_pool: Callable[..., Awaitable[Any]],
        limits: ImageLimits,
    ) -> None:
        """
        Args:
            in_pool: runs a function in the decode pool, off the event loop.
        """
        self._batcher = batcher
        self._postprocessor = postprocessor
        self._metrics = metrics
        self._in_pool = in_pool
        self._limits = limits

    def admit(self, plans: Mapping[str, ExecutionPlan], inputs: Sequence[Input]) -> None:
        """Reserve a place for every input in the queue of each of its passes.

        Args:
            plans: by modality.

        Raises:
            ServiceError: a queue is full, or its trunk is being unloaded. No place is reserved.
        """
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

    async def infer(
        self,
        item: Input,
        plan: ExecutionPlan,
        request: InferRequest,
        flow: object,
        turn: asyncio.Semaphore,
    ) -> ImageResult:
        """The results for one input, for which places are reserved.

        Args:
            flow: identifies the request in the queues, where requests take turns.
            turn: limits how many inputs of the request are decoded at a time.
        """
        groups: list[list[Entry]] = []
        passes = plan.passes
        try:
            async with until(request.deadline):
                async with turn:
                    started = time.monotonic()
                    prepared, size = await self._in_pool(prepare_all, item, passes, self._limits)
                    decode_s = time.monotonic() - started
                for trunk_pass, pieces in zip(passes, prepared, strict=True):
                    calls = [call.at_size(size) for call in trunk_pass.calls]
                    name = trunk_pass.name
                    groups.append([])
                    for number, piece in enumerate(pieces):
                        if number:  # `admit` reserved one place, which is the first piece's
                            await self._wait_for_place(trunk_pass)
                        entry = Entry(
                            Item(name, piece, calls), flow, request.bulk, request.deadline
                        )
                        groups[-1].append(entry)
                        self._batcher.put(name, entry)
                    self._metrics.stage_duration.labels("decode", name).observe(decode_s)
                results = [
                    [await asyncio.wrap_future(entry.payload.future) for entry in group]
                    for group in groups
                ]
                return await self._postprocessor.run(plan, results, item, size, decode_s)
        except TimeoutError:
            return ImageResult(
                error=DeadlineExceededError("the deadline passed before the result was computed")
            )
        except ModelsError as error:
            return ImageResult(error=from_library(error))
        except ServiceError as error:
            return ImageResult(error=error)
        except Exception:
            logger.exception("an input failed")
            return ImageResult(error=InternalError("the input could not be processed"))
        finally:
            for entry in itertools.chain(*groups):
                entry.cancelled = True  # drops it from its queue if it still waits there
            for trunk_pass in passes[len(groups) :]:
                self._batcher.release(trunk_pass.name, 1)

    async def _wait_for_place(self, trunk_pass: TrunkPass) -> None:
        """Wait for a place for one more piece of an admitted image, and reserve it."""
        while True:
            try:
                return self._batcher.admit(trunk_pass.name, 1)
            except QueueFull:
                await asyncio.sleep(0.02)
            except KeyError as error:
                raise self._refusal(trunk_pass.name, error) from error


def until(deadline: float) -> asyncio.Timeout:
    """A timeout at a deadline in `time.monotonic` seconds, which may be infinite."""
    return asyncio.timeout(None if deadline == math.inf else deadline - time.monotonic())
