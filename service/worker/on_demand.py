"""Models that are loaded when a request asks for them, within a memory budget."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from models.description import State
from models.errors import ModelsError
from models.registry import Registry
from service.errors import (
    LOADING_RETRY_AFTER_S,
    DeadlineExceededError,
    UnavailableError,
    from_library,
)
from service.types import Call
from service.worker.execution_plan import model_entry
from service.worker.pipeline import until

MIB = 2**20


class OnDemand:
    """Loads models when they are asked for. Where the loaded trunks' weights take more than the
    budget then, the trunks that were asked for least recently are unloaded, with all models on
    them."""

    def __init__(
        self,
        registry: Registry,
        budget_mb: int,
        keep: Sequence[str],
        in_loader: Callable[..., Awaitable[Any]],
        load: Callable[[str], None],
        unload: Callable[[str], None],
    ) -> None:
        """
        Args:
            budget_mb: MiB; 0: no model is loaded on demand.
            keep: models that stay loaded.
            in_loader: runs a function in the loader's thread.
            load, unload: a model by its name, in the loader's thread.
        """
        self._registry = registry
        self._budget = budget_mb * MIB
        self._keep = keep
        self._in_loader = in_loader
        self._load = load
        self._unload = unload
        # Trunks in the order of their last use. Changed on the event loop only.
        self._used: dict[str, None] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}

    async def ensure(self, calls: Sequence[Call], deadline: float) -> None:
        """Load the models of a request's calls that are not. Those that failed stay so.

        Raises:
            ServiceError: one does not load, or not by the deadline, or they do not fit into the
                budget together.
        """
        if not self._budget:
            return
        try:
            entries = [model_entry(self._registry, call) for call in calls]
            for trunk in itertools.chain.from_iterable(entry.trunks for entry in entries):
                self._used.pop(trunk, None)
                self._used[trunk] = None
            models = list(dict.fromkeys(entry.name for entry in entries))
            async with until(deadline):
                for name in self._missing(models):
                    await self._ensure(name)
            missing = self._missing(models)
        except TimeoutError as error:
            raise DeadlineExceededError("the deadline passed before a model was loaded") from error
        except ModelsError as error:
            raise from_library(error) from error
        if missing:
            raise UnavailableError(
                f"the models of this request do not fit into {self._budget // MIB} MiB together; "
                f"unloaded again: {', '.join(missing[:10])}",
                retry_after_s=LOADING_RETRY_AFTER_S,
            )

    def _missing(self, models: Collection[str]) -> list[str]:
        waiting = (State.UNLOADED, State.LOADING)
        return [name for name in models if self._registry.state(name) in waiting]

    async def _ensure(self, name: str) -> None:
        task = self._loading.get(name)
        if task is None:
            task = asyncio.create_task(self._load_within(name))
            self._loading[name] = task
            task.add_done_callback(lambda done: self._loaded(name, done))
        await asyncio.shield(task)  # others may wait for it, too

    def _loaded(self, name: str, task: "asyncio.Task[None]") -> None:
        del self._loading[name]
        if not task.cancelled():
            task.exception()  # those who waited until their deadline do not read it

    async def _load_within(self, name: str) -> None:
        await self._in_loader(self._load, name)
        await self._in_loader(self._make_room, name, [*self._used])

    def _make_room(self, name: str, least_recent_first: Sequence[str]) -> None:
        models = self._registry.catalog.models
        kept = {t for n in (name, *self._keep) if n in models for t in models[n].trunks}
        for trunk in least_recent_first:
            if self._weight_bytes() <= self._budget:
                return
            if trunk not in kept and self._registry.loaded_trunk(trunk) is not None:
                for model, entry in list(models.items()):
                    if trunk in entry.trunks and self._registry.state(model) is State.READY:
                        self._unload(model)

    def _weight_bytes(self) -> int:
        """Bytes of all loaded trunks' weights, and of those that their engines hold besides."""
        loaded = filter(None, map(self._registry.loaded_trunk, list(self._registry.catalog.trunks)))
        return sum(each.trunk.nbytes + each.trunk.engine.nbytes for each in loaded)
