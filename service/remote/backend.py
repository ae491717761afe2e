"""The Backend over workers: requests go to the least busy worker that has the model ready.

A request that a worker loses is sent to another one, once. Such requests are sent one at a time, so
that one that kills its workers takes no other request with it.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from models.description import ModelDescription, State
from service.changes import ChangeLog, changes_since
from service.errors import (
    LOADING_RETRY_AFTER_S,
    DeadlineExceededError,
    NotFoundError,
    ServiceError,
    UnavailableError,
)
from service.remote.descriptions import best_description, worker_state
from service.remote.discovery import Discovery
from service.remote.heads import RemoteHeads
from service.remote.merging import merge, run_all
from service.remote.metrics import RemoteMetrics
from service.remote.worker import Worker, WorkerLostError
from service.settings import Settings
from service.tls import WorkerCredentials
from service.types import Call, Health, InferRequest, InferResult, ModelChanges

logger = logging.getLogger(__name__)

RESOLVE_INTERVAL_S = 5.0
# How long a new request waits for a worker while some of them cannot be reached.
ROUTE_TIMEOUT_S = 1.0
POLL_S = 0.02

TOO_LATE = "the deadline passed before another worker was ready"

NO_WORKERS = frozenset[Worker]()


class RemoteBackend:
    """All workers that discovery finds, as one backend."""

    def __init__(self, settings: Settings, metrics: RemoteMetrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._discovery = Discovery(settings.workers)
        self._workers: dict[str, Worker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._credentials = WorkerCredentials(settings)
        self._retrying = asyncio.Lock()
        self._changes = ChangeLog()
        self.heads = RemoteHeads(lambda: self._workers.values())

    # -- Backend ---------------------------------------------------------------------------

    async def start(self) -> None:
        await self._discover()
        if self._discovery.changes:
            self._spawn(self._keep_discovering())

    def drain(self) -> None:
        self._closing = True

    async def close(self) -> None:
        self.drain()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(worker.close() for worker in self._workers.values()))

    def check_headers(self, model: str | None, *, bulk: bool, deadline: float) -> None:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineExceededError("the deadline passed before the body was read")
        refusal = None
        for worker in self._workers.values():
            for trunk in worker.trunks_of(model) if worker.up else ():
                refusal = worker.refusals.find(trunk, bulk=bulk, remaining_s=remaining_s)
                if refusal is None:
                    return
        if refusal is not None:
            raise refusal

    async def infer(self, request: InferRequest) -> InferResult:
        calls = [self._with_model(call) for call in request.calls]
        request = replace(request, calls=calls)
        kinds = {type(item): None for item in request.inputs}
        if len(kinds) < 2:
            return await self._infer(request, NO_WORKERS)
        # a message has inputs of one kind
        groups = [[n for n, item in enumerate(request.inputs) if type(item) is k] for k in kinds]
        results = await run_all(
            self._infer(replace(request, inputs=[request.inputs[n] for n in group]), NO_WORKERS)
            for group in groups
        )
        pairs = zip(groups, results, strict=True)
        images = {n: i for group, r in pairs for n, i in zip(group, r.images, strict=True)}
        return InferResult(results[0].models, [images[n] for n in range(len(images))])

    async def models(self, start: int = 0, count: int | None = None) -> Sequence[ModelDescription]:
        names = self._names()[start : None if count is None else start + count]
        return [await self.model(name) for name in names]

    async def changes(self, since: str) -> ModelChanges:
        return await changes_since(self._changes, since, self.model)

    async def model(self, name: str) -> ModelDescription:
        model = best_description(name, self._workers.values())
        if model is None:
            raise self._unknown(name)
        return model

    async def load(self, name: str) -> ModelDescription:
        await self._everywhere(name, Worker.load)
        return await self.model(name)

    async def unload(self, name: str) -> ModelDescription:
        await self._everywhere(name, Worker.unload)
        return await self.model(name)

    def knows(self, model: str) -> bool:
        return any(model in worker.models for worker in self._workers.values())

    def state(self) -> dict[str, Any]:
        return {"workers": {name: worker_state(worker) for name, worker in self._workers.items()}}

    def health(self) -> Health:
        """Ready while every start-up model is, somewhere; live while it can answer."""
        workers = list(self._workers.values())
        startup = {name for w in workers for name in w.known.startup}
        missing = [name for name in startup if not any(w.has_ready(name) for w in workers)]
        reasons = [f"model {name} is ready on no worker" for name in sorted(missing)]
        if not any(worker.up for worker in workers):
            reasons = ["no worker can be reached"]
        if self._closing:
            reasons = ["draining before exit", *reasons]
        ready = not reasons
        reasons += [f"worker {w.address}: {why}" for w in workers for why in w.health.reasons]
        return Health(live=True, ready=ready, reasons=reasons)

    # -- routing ---------------------------------------------------------------------------

    async def _infer(self, request: InferRequest, avoid: frozenset[Worker]) -> InferResult:
        """Run a request on the fewest workers that have its models ready.

        Args:
            avoid: workers that lost the request.
        """
        parts = await self._route(request, avoid)
        if len(parts) == 1:
            return await self._send(parts[0][0], request, avoid)
        results = await run_all(
            self._send(worker, replace(request, calls=[request.calls[i] for i in places]), avoid)
            for worker, places in parts
        )
        return merge(len(request.calls), [places for _, places in parts], results)

    async def _send(
        self, worker: Worker, request: InferRequest, avoid: frozenset[Worker]
    ) -> InferResult:
        try:
            return await worker.infer(request)
        except WorkerLostError as lost:
            if avoid:  # lost twice
                raise UnavailableError(
                    "two workers were lost during the request", retry_after_s=1
                ) from lost
        self._metrics.retries.labels(worker.address).inc()
        return await self._retry(request, worker)

    async def _retry(self, request: InferRequest, lost_by: Worker) -> InferResult:
        try:
            async with asyncio.timeout(max(0.0, request.deadline - time.monotonic())):
                await self._retrying.acquire()
        except TimeoutError as error:
            raise DeadlineExceededError(TOO_LATE) from error
        try:
            return await self._infer(request, frozenset({lost_by}))
        finally:
            self._retrying.release()

    async def _route(
        self, request: InferRequest, avoid: frozenset[Worker]
    ) -> list[tuple[Worker, list[int]]]:
        """The workers for a request, each with the positions of its calls.

        A request that a worker lost waits for another one until its deadline, a new request for
        ROUTE_TIMEOUT_S.

        Raises:
            ServiceError: no worker has a model ready in time.
        """
        until = request.deadline
        if not avoid:
            until = min(until, time.monotonic() + ROUTE_TIMEOUT_S)
        while True:
            try:
                return self._choose([str(call.model) for call in request.calls], avoid)
            except UnavailableError as error:
                if time.monotonic() >= until:
                    if avoid:
                        raise DeadlineExceededError(TOO_LATE) from error
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
            if any(places for worker, places in able.items() if not worker.health.draining):
                able = {w: places for w, places in able.items() if not w.health.draining}
            most = max((len(places) for places in able.values()), default=0)
            if most == 0:
                raise self._not_ready(models[left[0]])
            equal = [worker for worker, places in able.items() if len(places) == most]
            # workers that lost the request or keep failing only if there are no others
            chosen = min(
                equal, key=lambda w: (w in avoid, bool(w.ejected), w.outstanding, random.random())
            )
            parts.append((chosen, able[chosen]))
            left = [i for i in left if i not in able[chosen]]
        return parts

    def _with_model(self, call: Call) -> Call:
        """The call with its model's name, which is the task's default model if it has none."""
        if call.model is not None:
            return call
        for worker in self._workers.values():
            if (name := worker.known.defaults.get(str(call.task))) is not None:
                return replace(call, model=name)
        if not any(worker.models for worker in self._workers.values()):
            raise UnavailableError("no worker can be reached", retry_after_s=1)
        raise NotFoundError(f"no model in the catalog does the task {call.task!r}", field="model")

    def _not_ready(self, name: str) -> ServiceError:
        model = best_description(name, self._workers.values())
        if model is None:
            return self._unknown(name)
        if model.state == State.READY:
            reason = model.reason or "no worker that has it can be reached"
            return UnavailableError(f"model {name!r}: {reason}", retry_after_s=1)
        because = f": {model.reason}" if model.reason else ""
        return UnavailableError(
            f"model {name!r} is {model.state}{because}", retry_after_s=LOADING_RETRY_AFTER_S
        )

    def _unknown(self, name: str) -> ServiceError:
        names = chain.from_iterable(worker.models for worker in self._workers.values())
        some = ", ".join(sorted(set(islice(names, 10))))
        if not some:
            return UnavailableError("no worker can be reached", retry_after_s=1)
        return NotFoundError(f"no model {name!r} in the catalog; it has {some}", field="model")

    def _names(self) -> list[str]:
        return list(dict.fromkeys(chain(*(worker.models for worker in self._workers.values()))))

    def _note_change(self, model: str) -> None:
        self._changes.touch(model, removed=not self.knows(model))

    # -- workers ---------------------------------------------------------------------------

    async def _everywhere(
        self, name: str, work: Callable[[Worker, str], Coroutine[Any, Any, None]]
    ) -> None:
        """Do `work` on every reachable worker whose catalog has the model."""
        workers = [w for w in self._workers.values() if w.up and name in w.models]
        if not workers:
            raise self._unknown(name) if not self.knows(name) else self._not_ready(name)
        await run_all(work(worker, name) for worker in workers)

    async def _keep_discovering(self) -> None:
        while True:
            await asyncio.sleep(RESOLVE_INTERVAL_S)
            try:
                await self._discover()
            except Exception:
                logger.exception("discovering workers failed")

    async def _discover(self) -> None:
        addresses = await self._discovery.addresses()
        for address in addresses:
            if address not in self._workers:
                name = self._discovery.names.get(address, "")
                self._workers[address] = Worker(
                    address, self._settings, self._metrics, self._credentials,
                    self._note_change, name,
                )  # fmt: skip
        for address in self._workers.keys() - addresses:
            logger.info("worker %s was removed", address)
            removed = self._workers.pop(address)
            for name in removed.models:
                self._note_change(name)
            self._spawn(removed.close())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
