"""The Backend over workers: route by model, to the least busy; what one loses another answers."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any

from service.errors import (
    LOADING_RETRY_AFTER_S,
    DeadlineExceededError,
    NotFoundError,
    ServiceError,
    UnavailableError,
)
from service.remote.discovery import Discovery
from service.remote.heads import RemoteHeads
from service.remote.metrics import RemoteMetrics
from service.remote.worker import Worker, WorkerLostError, best_description
from service.settings import Settings
from service.types import Call, Health, ImageResult, InferRequest, InferResult

logger = logging.getLogger(__name__)

RESOLVE_INTERVAL_S = 5.0
# A new request waits this long for a worker when some of them are out of reach.
PATIENCE_S = 1.0
POLL_S = 0.02

Nobody = frozenset[Worker]()


class RemoteBackend:
    """All workers that discovery finds."""

    def __init__(self, settings: Settings, metrics: RemoteMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._discovery = Discovery(settings.workers)
        self._workers: dict[str, Worker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self.heads = RemoteHeads(lambda: self._workers.values())

    # -- Backend ---------------------------------------------------------------------------

    async def start(self) -> None:
        await self._find_workers()
        if self._discovery.changes:
            self._spawn(self._keep_finding())

    async def close(self) -> None:
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))

    async def infer(self, request: InferRequest) -> InferResult:
        calls = [self._with_model(call) for call in request.calls]
        request = replace(request, calls=calls)
        kinds = {type(item): None for item in request.inputs}
        if len(kinds) < 2:
            return await self._infer(request, Nobody)
        # a message holds inputs of one kind
        groups = [[n for n, item in enumerate(request.inputs) if type(item) is k] for k in kinds]
        results = await _all(
            self._infer(replace(request, inputs=[request.inputs[n] for n in group]), Nobody)
            for group in groups
        )
        pairs = zip(groups, results, strict=True)
        images = {n: i for group, r in pairs for n, i in zip(group, r.images, strict=True)}
        return InferResult(results[0].models, [images[n] for n in range(len(images))])

    async def models(self) -> Sequence[dict[str, Any]]:
        return [await self.model(name) for name in self._names()]

    async def model(self, name: str) -> dict[str, Any]:
        described = best_description(name, list(self._workers.values()))
        if described is None:
            raise self._unknown(name)
        return dict(described)

    async def load(self, name: str) -> dict[str, Any]:
        await self._everywhere(name, Worker.load)
        return await self.model(name)

    async def unload(self, name: str) -> dict[str, Any]:
        await self._everywhere(name, Worker.unload)
        return await self.model(name)

    def knows(self, model: str) -> bool:
        return any(model in worker.models for worker in self._workers.values())

    def health(self) -> Health:
        """Ready while every start-up model is, somewhere."""
        workers = list(self._workers.values())
        startup = {name for w in workers for name, model in w.models.items() if model["startup"]}
        missing = [name for name in startup if not any(w.has_ready(name) for w in workers)]
        reasons = [f"model {name} is ready nowhere" for name in sorted(missing)]
        if not any(worker.up for worker in workers):
            reasons = ["no worker is within reach"]
        if self._closing:
            reasons = ["draining before exit", *reasons]
        ready = not reasons
        reasons += [f"worker {w.address}: {why}" for w in workers for why in w.health.reasons]
        return Health(live=True, ready=ready, reasons=reasons)

    # -- a request's way -------------------------------------------------------------------

    async def _infer(self, request: InferRequest, avoid: frozenset[Worker]) -> InferResult:
        """Ask the fewest workers that have all models wanted; `avoid` has lost it already."""
        parts = await self._route(request, avoid)
        if len(parts) == 1:
            return await self._ask(parts[0][0], request, avoid)
        results = await _all(
            self._ask(worker, replace(request, calls=[request.calls[i] for i in places]), avoid)
            for worker, places in parts
        )
        return _merge(len(request.calls), [places for _, places in parts], results)

    async def _ask(
        self, worker: Worker, request: InferRequest, avoid: frozenset[Worker]
    ) -> InferResult:
        try:
            return await worker.infer(request)
        except WorkerLostError as lost:
            if avoid:  # given away once already
                raise UnavailableError(
                    "the workers that had it went away", retry_after_s=1
                ) from lost
        self._metrics.retries.labels(worker.address).inc()
        return await self._infer(request, frozenset({worker}))

    async def _route(
        self, request: InferRequest, avoid: frozenset[Worker]
    ) -> list[tuple[Worker, list[int]]]:
        """Workers, each with the positions of the calls that it gets. A request that was lost
        waits for a worker until its deadline, a new one for a moment.

        Raises:
            ServiceError: no worker has a model ready in time.
        """
        until = request.deadline
        if not avoid:
            until = min(until, time.monotonic() + PATIENCE_S)
        while True:
            try:
                return self._choose([str(call.model) for call in request.calls], avoid)
            except UnavailableError as error:
                if time.monotonic() >= until:
                    if avoid:
                        text = "the deadline passed before there was a worker again"
                        raise DeadlineExceededError(text) from error
                    raise
                if not avoid and all(worker.up for worker in self._workers.values()):
                    raise
            await asyncio.sleep(POLL_S)

    def _choose(
        self, models: Sequence[str], avoid: frozenset[Worker]
    ) -> list[tuple[Worker, list[int]]]:
        left = list(range(len(models)))
        parts: list[tuple[Worker, list[int]]] = []
        while left or not parts:
            able: dict[Worker, list[int]] = {
                worker: [i for i in left if worker.has_ready(models[i])]
                for worker in self._workers.values()
            }
            most = max((len(places) for places in able.values()), default=0)
            if most == 0:
                raise self._not_ready(models[left[0]])
            equal = [worker for worker, places in able.items() if len(places) == most]
            # one that lost the request or keeps failing only if there is no other
            chosen = min(
                equal, key=lambda w: (w in avoid, w.ejected, w.outstanding, random.random())
            )
            parts.append((chosen, able[chosen]))
            left = [i for i in left if i not in able[chosen]]
        return parts

    def _with_model(self, call: Call) -> Call:
        """The call with its model's name: the catalog's default for the task if none was given."""
        if call.model is not None:
            return call
        for worker in self._workers.values():
            for name, described in worker.models.items():
                if call.task in described["default_for"]:
                    return replace(call, model=name)
        if not any(worker.models for worker in self._workers.values()):
            raise UnavailableError("no worker is within reach", retry_after_s=1)
        raise NotFoundError(f"no model in the catalog does the task {call.task!r}", field="model")

    def _not_ready(self, name: str) -> ServiceError:
        described = best_description(name, list(self._workers.values()))
        if described is None:
            return self._unknown(name)
        state, reason = described["state"], described["reason"]
        if state == "ready":
            why = reason or "no worker that has it is within reach"
            return UnavailableError(f"model {name!r}: {why}", retry_after_s=1)
        because = f": {reason}" if reason else ""
        return UnavailableError(
            f"model {name!r} is {state}{because}", retry_after_s=LOADING_RETRY_AFTER_S
        )

    def _unknown(self, name: str) -> ServiceError:
        names = sorted(self._names())
        if not names:
            return UnavailableError("no worker is within reach", retry_after_s=1)
        some = ", ".join(names[:10])
        return NotFoundError(f"no model {name!r} in the catalog; it has {some}", field="model")

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for w in self._workers.values() for name in w.models))

    # -- workers ---------------------------------------------------------------------------

    async def _everywhere(
        self, name: str, work: Callable[[Worker, str], Coroutine[Any, Any, None]]
    ) -> None:
        """On every worker within reach whose catalog has the model."""
        workers = [w for w in self._workers.values() if w.up and name in w.models]
        if not workers:
            raise self._unknown(name) if not self.knows(name) else self._not_ready(name)
        await _all(work(worker, name) for worker in workers)

    async def _keep_finding(self) -> None:
        while True:
            await asyncio.sleep(RESOLVE_INTERVAL_S)
            try:
                await self._find_workers()
            except Exception:
                logger.exception("looking for workers failed")

    async def _find_workers(self) -> None:
        addresses = await self._discovery.addresses()
        for address in addresses:
            if address not in self._workers:
                self._workers[address] = Worker(address, self._settings, self._metrics)
        for address in self._workers.keys() - addresses:
            logger.info("worker %s is no more", address)
            self._spawn(self._workers.pop(address).close())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _all(work: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All results, or the first error, with the rest cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(item) for item in work]
    except* ServiceError as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _merge(
    count: int, parts: Sequence[Sequence[int]], results: Sequence[InferResult]
) -> InferResult:
    """Several workers' answers as one. An image that failed at one worker fails those calls."""
    models: list[Any] = [None] * count
    outputs: list[list[Any]] = [[None] * count for _ in results[0].images]
    for places, result in zip(parts, results, strict=True):
        for i, used in zip(places, result.models, strict=True):
            models[i] = used
        for row, image in zip(outputs, result.images, strict=True):
            for position, i in enumerate(places):
                row[i] = image.error or image.outputs[position]
    images = []
    for n, row in enumerate(outputs):
        errors = [output for output in row if isinstance(output, ServiceError)]
        timing = results[0].images[n].timing
        if len(errors) == count:
            images.append(ImageResult(error=errors[0], timing=timing))
        else:
            images.append(ImageResult(row, timing=timing))
    return InferResult(models, images)
