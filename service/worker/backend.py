"""The worker's engine, the in-process Backend: the order in which everything happens."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import ModelsError
from models.heads.prompted import Prompted, answering
from models.inputs.types import modality_of
from models.model import Model
from models.registry import Registry, State
from service.errors import (
    DeadlineExceededError,
    NotFoundError,
    QueueFullError,
    ServiceError,
    from_library,
)
from service.metrics import Metrics
from service.types import Call, Health, InferRequest, InferResult
from service.worker.execution_plan import (
    Resolved,
    Way,
    plan_way,
    resolve,
)
from service.worker.fit_jobs import Fits
from service.worker.head_store import HeadFolder
from service.worker.loader import Loader
from service.worker.pipeline import Inputs, until
from service.worker.postprocess import Finisher
from service.worker.prompts import PromptCache
from service.worker.runner import use_threads
from service.worker.trunks import ServedTrunks
from service.worker_options import EngineOptions

logger = logging.getLogger(__name__)

MANY = 100  # texts of a label set; more of them step behind interactive requests


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
        self._loader = Loader()
        folder = Path(options.heads_folder or registry.store.root / "heads")
        self._fits = Fits(registry, folder, self.batcher, self._limits, metrics)
        self.heads = HeadFolder(registry, folder, self._fits, self._loader.run)
        finisher = Finisher(metrics, self._in_pool, self._limits)
        self._inputs = Inputs(self.batcher, finisher, metrics, self._in_pool, self._limits)
        self._prompts = PromptCache(self._embed_texts, options.label_cache_bytes, metrics)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        registry.on_load = self._on_load
        registry.on_unload = self.trunks.retire

    # -- Backend ---------------------------------------------------------------------------

    async def start(self) -> None:
        self.batcher.start()
        for name in self._startup:
            self.registry.catalog.model(name)
            self._spawn(self._load_quietly(name))
        self._spawn(self.heads.run())
        self._spawn(self.trunks.prober.run())

    async def close(self) -> None:
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._fits.close)
        await asyncio.to_thread(self.batcher.close)
        self._pool.shutdown()
        self._loader.close()

    async def infer(self, request: InferRequest) -> InferResult:
        inputs = request.readable
        modalities = dict.fromkeys(map(modality_of, inputs)) or {"image": None}
        ways = {modality: await self._way(request, modality) for modality in modalities}
        self._inputs.admit(ways, inputs)
        # one request decodes on all threads at most, so that no request waits behind a big one
        turn = asyncio.Semaphore(self.options.decode_threads)
        flow = object()
        results = await asyncio.gather(
            *(
                self._inputs.infer(item, ways[modality_of(item)], request, flow, turn)
                for item in inputs
            )
        )
        first = next(iter(ways.values()))
        return InferResult([item.used for item in first.resolved], results)

    async def models(self) -> Sequence[dict[str, Any]]:
        described = []
        for name in self.registry.catalog.models:
            with contextlib.suppress(NotFoundError):  # a head that was deleted meanwhile
                described.append(await self.model(name))
        return described

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
        await self._loader.run(self.registry.load, name)
        return await self.model(name)

    async def unload(self, name: str) -> dict[str, Any]:
        await self._loader.run(self.registry.unload, name)
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
        waiting += [] if self.heads.settled else ["the heads are not read yet"]
        waiting += [f"trunk {n}: {why}" for n, why in self.trunks.prober.failures.items()]
        return Health(live=not dead, ready=not dead and not waiting, reasons=dead + waiting)

    # -- a request's way -------------------------------------------------------------------

    async def _way(self, request: InferRequest, modality: str) -> Way:
        """Resolve the calls for inputs of one modality; prompted heads get their classes."""
        resolved = [resolve(self.registry, call, modality) for call in request.calls]
        try:
            async with until(request.deadline):
                return plan_way([await self._prompted(item) for item in resolved])
        except TimeoutError as error:
            raise DeadlineExceededError(
                "the deadline passed before the labels were read"
            ) from error

    async def _prompted(self, item: Resolved) -> Resolved:
        if not isinstance(item.head, Prompted):
            return item
        labels, templates = item.head.prompt(item.finish_options)
        classes = await self._prompts.get(item.model, labels, templates)
        return replace(item, finish_options=answering(item.finish_options, labels, classes))

    async def _embed_texts(self, model: Model, texts: Sequence[str]) -> np.ndarray:
        """(N, D) embeddings by way of the queue, a few at a time, so that others get turns."""
        call = Call(model.name, "embed", {"normalize": True})
        rows: list[np.ndarray] = [np.empty(0)] * len(texts)
        left = iter(enumerate(texts))

        async def embed_some() -> None:
            for position, text in left:
                way = plan_way([resolve(self.registry, call, "text")])
                while True:
                    try:
                        self._inputs.admit({"text": way}, [text])
                        break
                    except QueueFullError:
                        await asyncio.sleep(0.02)
                wanted = InferRequest(
                    inputs=(), calls=(), deadline=math.inf, bulk=len(texts) > MANY
                )
                result = await self._inputs.infer(text, way, wanted, left, asyncio.Semaphore())
                output = result.error or result.outputs[0]
                if isinstance(output, ServiceError):
                    raise output
                rows[position] = output["embedding"]

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(texts), 2 * self.options.max_batch_size)):
                    group.create_task(embed_some())
        except* ServiceError as errors:
            raise errors.exceptions[0] from None
        return np.stack(rows)

    # -- background ------------------------------------------------------------------------

    def _on_load(self, model: Model) -> None:
        """Bring the model into service; the label set of its catalog entry is read already."""
        self.trunks.serve(model)
        head = model.heads[model.task]
        if isinstance(head, Prompted) and head.labels:
            self._prompts.prepare(model, head.labels, head.templates)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load_quietly(self, name: str) -> None:
        try:
            await self._loader.run(self.registry.load, name)
        except ServiceError as error:
            logger.error("model %s did not load: %s", name, error.detail)

    async def _in_pool(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
