"""Which worker runs a request: the least busy one that has its models ready."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar
from zlib import crc32

from models.description import State
from service.errors import (
    LOADING_RETRY_AFTER_S,
    DeadlineExceededError,
    NotFoundError,
    ServiceError,
    UnavailableError,
)
from service.remote.versions import is_well
from service.remote.worker import Worker
from service.remote.workers import Workers
from service.types import Call, InferRequest

# How long a new request waits for a worker while some of them cannot be reached.
ROUTE_TIMEOUT_S = 1.0
POLL_S = 0.02
# The least busy of so many workers is hardly busier than that of all (Mitzenmacher, "The Power of
# Two Choices in Randomized Load Balancing", 2001), and is found as quickly among a thousand.
SAMPLE = 16

TOO_LATE = "the deadline passed before another worker was ready"

T = TypeVar("T")


class Router:
    """Chooses among a gateway's workers."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    async def route(
        self, request: InferRequest, avoid: frozenset[Worker]
    ) -> list[tuple[Worker, list[int]]]:
        """The workers for a request, each with the positions of its calls.

        A request that a worker lost waits for another one until its deadline, a new request for
        ROUTE_TIMEOUT_S.

        Raises:
            ServiceError: no worker has a model ready in time.
        """
        models = [str(call.model) for call in request.calls]
        if not avoid:
            return await self._soon(lambda: self._choose(models, avoid), request.deadline)
        while True:
            try:
                return self._choose(models, avoid)
            except UnavailableError as error:
                if time.monotonic() >= request.deadline:
                    raise DeadlineExceededError(TOO_LATE) from error
            await asyncio.sleep(POLL_S)

    async def with_models(self, request: InferRequest) -> InferRequest:
        """The request with the task's default model in each call that names none.

        While no worker's models are known, as when the gateway has just started, it waits as a new
        request does.

        Raises:
            ServiceError: no worker is known to have such a model in time.
        """
        calls = await self._soon(
            lambda: [self._with_model(call) for call in request.calls], request.deadline
        )
        return replace(request, calls=calls)

    async def _soon(self, choose: Callable[[], T], deadline: float) -> T:
        """What is chosen, tried for ROUTE_TIMEOUT_S while some workers cannot be reached."""
        until = min(deadline, time.monotonic() + ROUTE_TIMEOUT_S)
        while True:
            try:
                return choose()
            except UnavailableError:
                if time.monotonic() >= until or all(worker.up for worker in self._workers):
                    raise
            await asyncio.sleep(POLL_S)

    def _choose(
        self, models: Sequence[str], avoid: frozenset[Worker]
    ) -> list[tuple[Worker, list[int]]]:
        left = list(range(len(models)))
        parts: list[tuple[Worker, list[int]]] = []
        while left or not parts:
            able = self._able(models, left, avoid)
            if any(not worker.health.draining for worker in able):
                able = {w: places for w, places in able.items() if not w.health.draining}
            if not able:
                raise self.not_ready(models[left[0]])
            most = max(map(len, able.values()))
            equal = [worker for worker, places in able.items() if len(places) == most]
            # workers that lost the request or keep failing only if there are no others
            chosen = min(
                equal, key=lambda w: (w in avoid, bool(w.ejected), w.outstanding, random.random())
            )
            parts.append((chosen, able[chosen]))
            left = [i for i in left if i not in able[chosen]]
        return parts

    def _able(
        self, models: Sequence[str], left: Sequence[int], avoid: frozenset[Worker]
    ) -> dict[Worker, list[int]]:
        """Workers that have any of the models ready, each with the positions of those models. They
        have them in one version. A model that no worker has ready is loaded by one of them, if it
        loads models on demand.

        For a model that many have, these are SAMPLE of them, unless none of those is good.
        """
        able: dict[Worker, list[int]] = {}
        digests: dict[str, str | None] = {}
        loading: dict[str, Worker] = {}
        for model in dict.fromkeys(models[i] for i in left):
            if (version := self._workers.versions.serving(model)) is None:
                if (worker := self._loader_of(model, avoid)) is not None:
                    able[worker], loading[model] = [], worker
                continue
            having = version.workers
            some = having if len(having) <= SAMPLE else random.sample(having, SAMPLE)
            if not any(w.has_version(model, version.digest) and is_well(w) for w in some):
                some = having
            digests[model] = version.digest
            able |= {w: [] for w in some if w.has_version(model, version.digest)}
        positions = [i for i in left if models[i] in digests]
        for worker, places in able.items():
            places += [i for i in positions if worker.has_version(models[i], digests[models[i]])]
            places += [i for i in left if loading.get(models[i]) is worker]
        return able

    def _loader_of(self, model: str, avoid: frozenset[Worker]) -> Worker | None:
        """The worker that a model is loaded on, by a request for it. All gateways choose the same
        one while the workers are the same (rendezvous hashing), so that one copy is loaded."""
        return min(
            (worker for worker in self._workers.having(model) if worker.would_load(model)),
            key=lambda w: (
                w in avoid, not is_well(w), w.models[model].state == State.FAILED,
                crc32(f"{w.address} {model}".encode()),
            ),
            default=None,
        )  # fmt: skip

    def _with_model(self, call: Call) -> Call:
        if call.model is not None:
            return call
        if (name := self._workers.default_model(str(call.task))) is not None:
            return replace(call, model=name)
        if not any(worker.models for worker in self._workers):
            raise UnavailableError("no worker can be reached", retry_after_s=1)
        raise NotFoundError(f"no model in the catalog does the task {call.task!r}", field="model")

    def not_ready(self, name: str) -> ServiceError:
        """Why no worker can be asked for a model."""
        model = self._workers.describe(name)
        if model is None:
            return self.unknown(name)
        if model.state == State.READY:
            reason = model.reason or "no worker that has it can be reached"
            return UnavailableError(f"model {name!r}: {reason}", retry_after_s=1)
        because = f": {model.reason}" if model.reason else ""
        return UnavailableError(
            f"model {name!r} is {model.state}{because}", retry_after_s=LOADING_RETRY_AFTER_S
        )

    def unknown(self, name: str) -> ServiceError:
        """Why no worker is known to have a model of that name."""
        some = ", ".join(self._workers.some_names())
        if not some:
            return UnavailableError("no worker can be reached", retry_after_s=1)
        return NotFoundError(f"no model {name!r} in the catalog; it has {some}", field="model")
