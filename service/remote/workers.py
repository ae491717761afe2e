"""The workers that discovery finds, and what is known over all of them."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Coroutine, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

from models.description import ModelDescription
from service.changes import ChangeLog
from service.remote.descriptions import best_description
from service.remote.discovery import Discovery
from service.remote.metrics import RemoteMetrics
from service.remote.versions import Versions
from service.remote.worker import Worker
from service.settings import Settings
from service.tls import WorkerCredentials

logger = logging.getLogger(__name__)

RESOLVE_INTERVAL_S = 5.0


class Workers:
    """A gateway's workers by address, each probed while discovery finds it.

    Attributes:
        changes: which models were added, changed or removed, on any worker.
        versions: which of a model's workers answer.
    """

    def __init__(self, settings: Settings, metrics: RemoteMetrics) -> None:
        self.changes = ChangeLog()
        self.versions = Versions(self.having)
        self._settings = settings
        self._metrics = metrics
        self._discovery = Discovery(settings.workers)
        self._credentials = WorkerCredentials(settings)
        self._by_address: dict[str, Worker] = {}
        # For each model the workers that know it, by address.
        self._holders: defaultdict[str, dict[str, Worker]] = defaultdict(dict)
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._by_address.values())

    async def start(self) -> None:
        """Find the workers, and go on looking for others where they can change."""
        await self._discover()
        if self._discovery.changes:
            self._spawn(self._keep_discovering())

    async def close(self) -> None:
        """Close all workers after their outstanding requests."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(worker.close() for worker in self))

    def knows(self, model: str) -> bool:
        """Whether any worker's catalog has the model."""
        return model in self._holders

    def having(self, model: str) -> Sequence[Worker]:
        """The workers whose catalogs have a model."""
        return list(self._holders[model].values()) if model in self._holders else []

    def names(self) -> Iterator[str]:
        """The names of all models, each once."""
        return iter(dict.fromkeys(chain.from_iterable(worker.models for worker in self)))

    def some_names(self) -> list[str]:
        """Up to ten models' names, in alphabetical order."""
        return sorted(islice(self._holders, 10))

    def describe(self, model: str) -> ModelDescription | None:
        """A model's description by a worker that answers, or where it is closest to answering."""
        serving = self.versions.serving(model)
        return best_description(model, self.having(model), serving.workers if serving else ())

    def default_model(self, task: str) -> str | None:
        """The model that does a task by default, by the first worker that has one."""
        names = (worker.known.defaults.get(task) for worker in self)
        return next((name for name in names if name is not None), None)

    def _note_change(self, address: str, model: str) -> None:
        worker, holders = self._by_address.get(address), self._holders[model]
        if worker is not None and model in worker.models:
            holders[address] = worker
            self.versions.note(model, worker.models[model].model_digest)
        else:
            holders.pop(address, None)
            self.versions.note(model, None)
            if not holders:
                del self._holders[model]
                self.versions.note_removed(model)
        self.changes.touch(model, removed=not self.knows(model))

    def _note_state(self) -> None:
        self.versions.note_worker()
        for model in self.versions.differing:  # another version may answer now
            self.changes.touch(model)

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
            if address not in self._by_address:
                name = self._discovery.names.get(address, "")
                self._by_address[address] = Worker(
                    address, self._settings, self._metrics, self._credentials,
                    partial(self._note_change, address), self._note_state, name,
                )  # fmt: skip
        for address in self._by_address.keys() - addresses:
            logger.info("worker %s was removed", address)
            removed = self._by_address.pop(address)
            for name in removed.models:
                self._note_change(address, name)
            self._spawn(removed.close())

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
