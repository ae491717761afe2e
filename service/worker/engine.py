"""The worker's engine, the in-process Backend: the order in which everything happens."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from models.errors import ModelsError
from models.images import decode_image
from models.registry import Registry, State
from service.errors import (
    DeadlineExceededError,
    InternalError,
    QueueFullError,
    ServiceError,
    UnavailableError,
    from_library,
)
from service.metrics import Metrics
from service.types import Health, ImageResult, InferRequest, InferResult, Input, Timing
from service.worker.options import EngineOptions
from service.worker.plan import Resolved, TrunkPass, plan_passes, prepared_pixels, resolve
from service.worker.runner import Item, ItemResult, use_threads
from service.worker.scheduler import Entry, QueueFull
from service.worker.trunks import ServedTrunks

logger = logging.getLogger(__name__)


class Engine:
    """Owns the device, the decode pool and the registry of one process."""

    def __init__(self, registry: Registry, options: EngineOptions, metrics: Metrics) -> None:
        self.registry = registry
        self.options = options.resolve(registry.device.type)
        self._metrics = metrics
        self._startup = options.startup or registry.catalog.startup
        self._limits = options.image_limits
        self.trunks = ServedTrunks(registry, self.options, metrics)
        self.batcher = self.trunks.batcher
        use_threads(1)  # here and in all threads to come, but the lanes: see there
        alone = partial(use_threads, 1)
        self._pool = ThreadPoolExecutor(self.options.decode_threads, "decode", initializer=alone)
        self._loader = ThreadPoolExecutor(1, "loader", initializer=alone)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        registry.on_load = self.trunks.serve
        registry.on_unload = self.trunks.retire

    # -- Backend ---------------------------------------------------------------------------

    async def start(self) -> None:
        self.batcher.start()
        for name in self._startup:
            self.registry.catalog.model(name)
            self._spawn(self._load_quietly(name))
        self._spawn(self.trunks.prober.run())

    async def close(self) -> None:
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.batcher.close)
        self._pool.shutdown()
        self._loader.shutdown(wait=False, cancel_futures=True)

    async def infer(self, request: InferRequest) -> InferResult:
        resolved = [resolve(self.registry, call) for call in request.calls]
        passes = plan_passes(resolved)
        self._admit(passes, len(request.inputs))
        # one request decodes on all threads at most, so that no request waits behind a big one
        turn = asyncio.Semaphore(self.options.decode_threads)
        way = (resolved, passes, request, object(), turn)
        images = await asyncio.gather(*(self._infer_image(i, *way) for i in request.inputs))
        return InferResult([item.used for item in resolved], images)

    async def models(self) -> Sequence[dict[str, Any]]:
        return [await self.model(name) for name in self.registry.catalog.models]

    async def model(self, name: str) -> dict[str, Any]:
        try:
            described = self.registry.describe(name)
        except ModelsError as error:
            raise from_library(error) from error
        described["startup"] = name in self._startup
        if failure := self.trunks.prober.failures.get(described["trunk"]):
            described["reason"] = failure
        return described

    async def load(self, name: str) -> dict[str, Any]:
        await self._in_loader(self.registry.load, name)
        return await self.model(name)

    async def unload(self, name: str) -> dict[str, Any]:
        await self._in_loader(self.registry.unload, name)
        return await self.model(name)

    def knows(self, model: str) -> bool:
        return model in self.registry.catalog.models

    def health(self) -> Health:
        dead = []
        if not self.batcher.alive():
            dead.append("a device thread died")
        if (stuck := self.batcher.stuck_for()) > self.options.stuck_after_s:
            dead.append(f"a batch has been running for {stuck:.0f} s")
        waiting = ["draining before exit"] if self._closing else []
        waiting += [
            f"model {name} is {state}"
            for name in self._startup
            if (state := self.registry.state(name)) is not State.READY
        ]
        waiting += [f"trunk {n}: {why}" for n, why in self.trunks.prober.failures.items()]
        return Health(live=not dead, ready=not dead and not waiting, reasons=dead + waiting)

    # -- a request's way -------------------------------------------------------------------

    def _admit(self, passes: Sequence[TrunkPass], count: int) -> None:
        """Take places for every image in every trunk's queue, or none at all."""
        for done, plan in enumerate(passes):
            try:
                self.batcher.admit(plan.trunk, count)
            except (QueueFull, KeyError) as error:
                for admitted in passes[:done]:
                    self.batcher.release(admitted.trunk, count)
                if isinstance(error, KeyError):
                    raise UnavailableError(
                        "the model is being unloaded", retry_after_s=1
                    ) from error
                wait_s = max(1.0, self.batcher.queue_seconds())
                raise QueueFullError(f"{plan.trunk}: {error}", retry_after_s=wait_s) from error

    async def _infer_image(
        self,
        image: Input,
        resolved: Sequence[Resolved],
        passes: Sequence[TrunkPass],
        request: InferRequest,
        flow: object,
        turn: asyncio.Semaphore,
    ) -> ImageResult:
        entries: list[Entry] = []
        try:
            async with asyncio.timeout(request.deadline - time.monotonic()):
                async with turn:
                    started = time.monotonic()
                    pixels, size = await self._in_pool(self._prepare, image, passes)
                    decode_s = time.monotonic() - started
                for plan, pixels_CHW in zip(passes, pixels, strict=True):
                    item = Item(plan.trunk, pixels_CHW, plan.calls)
                    entries.append(Entry(item, flow, request.bulk, request.deadline))
                    self.batcher.put(plan.trunk, entries[-1])
                    self._metrics.stage_duration.labels("decode", plan.trunk).observe(decode_s)
                results = [await asyncio.wrap_future(e.payload.future) for e in entries]
                return await self._finish(resolved, passes, results, size, decode_s)
        except TimeoutError:
            return ImageResult(error=DeadlineExceededError("the deadline passed before the answer"))
        except ModelsError as error:
            return ImageResult(error=from_library(error))
        except ServiceError as error:
            return ImageResult(error=error)
        except Exception:
            logger.exception("an image failed")
            return ImageResult(error=InternalError("the image could not be processed"))
        finally:
            for entry in entries:
                entry.cancelled = True  # harmless once answered; else it is dropped unrun
            for plan in passes[len(entries) :]:
                self.batcher.release(plan.trunk, 1)

    def _prepare(
        self, image: Input, passes: Sequence[TrunkPass]
    ) -> tuple[list[torch.Tensor], tuple[int, int]]:
        if isinstance(image, np.ndarray):
            prepared = [prepared_pixels(image, plan.model) for plan in passes]
            return prepared, (image.shape[2], image.shape[1])
        decoded = decode_image(image, self._limits)
        return [plan.model.transform(decoded) for plan in passes], decoded.size

    async def _finish(
        self,
        resolved: Sequence[Resolved],
        passes: Sequence[TrunkPass],
        results: Sequence[ItemResult],
        size: tuple[int, int],
        decode_s: float,
    ) -> ImageResult:
        outputs: list[Any] = [None] * len(resolved)
        for plan, result in zip(passes, results, strict=True):
            for position, row in zip(plan.positions, result.rows, strict=True):
                started = time.monotonic()
                outputs[position] = await self._finish_one(resolved[position], row, size)
                spent_s = time.monotonic() - started
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

    # -- background ------------------------------------------------------------------------

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load_quietly(self, name: str) -> None:
        try:
            await self._in_loader(self.registry.load, name)
        except ServiceError as error:
            logger.error("model %s did not load: %s", name, error.detail)

    async def _in_pool(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def _in_loader(self, function: Any, name: str) -> Any:
        """Run the registry's slow work; whatever goes wrong comes back as a ServiceError."""
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._loader, function, name)
        except ModelsError as error:
            raise from_library(error) from error
        except Exception as error:
            logger.exception("loading or unloading %s failed", name)
            raise UnavailableError(f"model {name} could not be loaded or unloaded") from error
