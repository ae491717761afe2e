"""The Backend over workers: requests go to the least busy worker that has the model ready.

A request that a worker loses is sent to another one, once. Such requests are sent one at a time, so
that one that kills its workers takes no other request with it.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from models.description import ModelDescription
from service.changes import changes_since
from service.describing import describe_each
from service.errors import DeadlineExceededError, UnavailableError
from service.remote.descriptions import differences, worker_state
from service.remote.heads import RemoteHeads
from service.remote.merging import merge, run_all
from service.remote.metrics import RemoteMetrics
from service.remote.routing import TOO_LATE, Router
from service.remote.worker import Worker, WorkerLostError
from service.remote.workers import Workers
from service.settings import Settings
from service.types import Health, InferRequest, InferResult, ModelChanges
from service.versions import of_one_version

NO_WORKERS = frozenset[Worker]()


class RemoteBackend:
    """All workers that discovery finds, as one backend."""

    def __init__(self, settings: Settings, metrics: RemoteMetrics) -> None:
        self._metrics = metrics
        self._workers = Workers(settings, metrics)
        self._router = Router(self._workers)
        self._closing = False
        self._retrying = asyncio.Lock()
        self.heads = RemoteHeads(self._workers)

    # -- Backend ---------------------------------------------------------------------------

    async def start(self) -> None:
        await self._workers.start()

    def drain(self) -> None:
        self._closing = True

    async def close(self) -> None:
        self.drain()
        await self._workers.close()

    def check_headers(self, model: str | None, *, bulk: bool, deadline: float) -> None:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineExceededError("the deadline passed before the body was read")
        refusal = None
        for worker in self._workers if model is None else self._workers.having(model):
            for trunk in worker.trunks_of(model) if worker.up else ():
                refusal = worker.refusals.find(trunk, bulk=bulk, remaining_s=remaining_s)
                if refusal is None:
                    return
        if refusal is not None:
            raise refusal

    async def infer(self, request: InferRequest) -> InferResult:
        return await self._infer(await self._router.with_models(request), NO_WORKERS)

    async def models(self, start: int = 0, count: int | None = None) -> Sequence[ModelDescription]:
        end = None if count is None else start + count
        names = islice(self._workers.names(), start, end)
        return list(filter(None, (await describe_each(names, self._workers.describe)).values()))

    async def changes(self, since: str) -> ModelChanges:
        return await changes_since(self._workers.changes, since, self._workers.describe)

    async def model(self, name: str) -> ModelDescription:
        if (model := self._workers.describe(name)) is None:
            raise self._router.unknown(name)
        return model

    async def load(self, name: str) -> ModelDescription:
        await self._everywhere(name, Worker.load)
        return await self.model(name)

    async def unload(self, name: str) -> ModelDescription:
        await self._everywhere(name, Worker.unload)
        return await self.model(name)

    def knows(self, model: str) -> bool:
        return self._workers.knows(model)

    def state(self) -> dict[str, Any]:
        left_out = self._workers.versions.left_out()
        return {"workers": {w.address: worker_state(w, left_out.get(w, ())) for w in self._workers}}

    def health(self) -> Health:
        """Ready while every start-up model is, somewhere; live while it can answer."""
        workers = list(self._workers)
        startup = {name for w in workers for name in w.known.startup}
        missing = [name for name in startup if not any(w.has_ready(name) for w in workers)]
        reasons = [f"model {name} is ready on no worker" for name in sorted(missing)]
        if not any(worker.up for worker in workers):
            reasons = ["no worker can be reached"]
        if self._closing:
            reasons = ["draining before exit", *reasons]
        ready = not reasons
        reasons += [f"worker {w.address}: {why}" for w in workers for why in w.health.reasons]
        for worker, models in self._workers.versions.left_out().items():
            reasons += [f"worker {worker.address}: {why}" for why in differences(models)]
        return Health(live=True, ready=ready, reasons=reasons)

    # -- sending ---------------------------------------------------------------------------

    async def _infer(self, request: InferRequest, avoid: frozenset[Worker]) -> InferResult:
        """Run a request on the fewest workers that have its models ready.

        Args:
            avoid: workers that lost the request.
        """
        parts = await self._router.route(request, avoid)
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
            return await _infer_by_kind(worker, request)
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

    # -- workers ---------------------------------------------------------------------------

    async def _everywhere(
        self, name: str, work: Callable[[Worker, str], Coroutine[Any, Any, None]]
    ) -> None:
        """Do `work` on every reachable worker whose catalog has the model."""
        workers = [w for w in self._workers.having(name) if w.up]
        if not workers:
            raise self._router.not_ready(name)
        await run_all(work(worker, name) for worker in workers)


async def _infer_by_kind(worker: Worker, request: InferRequest) -> InferResult:
    """Run a request on a worker, in a message for each kind of its inputs."""
    kinds = {type(item): None for item in request.inputs}
    if len(kinds) < 2:
        return await worker.infer(request)
    groups = [[n for n, item in enumerate(request.inputs) if type(item) is k] for k in kinds]
    parts = [replace(request, inputs=[request.inputs[n] for n in group]) for group in groups]
    results = await of_one_version(lambda: run_all(map(worker.infer, parts)))
    pairs = zip(groups, results, strict=True)
    images = {n: i for group, r in pairs for n, i in zip(group, r.images, strict=True)}
    return InferResult(results[0].models, [images[n] for n in range(len(images))])
