"""Loads of single models that requests ask for: which may be loaded, and which are to be."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakValueDictionary

from models.catalog import ModelEntry
from models.description import State
from models.registry import Registry
from service.errors import ServiceError, UnavailableError
from service.worker.memory_budget import MemoryBudget, is_ready

# A model that did not load is tried again after this time.
RETRY_S = 60.0


class ModelLoads:
    """Loads a model once for all who ask for it, and one that failed only after a while."""

    def __init__(
        self,
        registry: Registry,
        memory: MemoryBudget,
        in_loader: Callable[..., Awaitable[Any]],
        load: Callable[[str], None],
    ) -> None:
        """
        Args:
            in_loader: runs a function in the loader's thread.
            load: loads a model, in the loader's thread.
        """
        self._registry = registry
        self._memory = memory
        self._in_loader = in_loader
        self._load = load
        # Models that an admin unloaded.
        self._stopped: set[str] = set()
        # When models did not load, in `time.monotonic` seconds.
        self._failed: dict[str, float] = {}
        # Held while a model is loading.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def stop(self, name: str) -> None:
        """Load a model no more."""
        self._stopped.add(name)

    def allow(self, name: str) -> None:
        """Load a model again that was stopped or that failed."""
        self._stopped.discard(name)
        self._failed.pop(name, None)

    def may_load(self, name: str) -> bool:
        """Whether a model was not stopped."""
        return name not in self._stopped

    def is_missing(self, entry: ModelEntry) -> bool:
        """Whether a model is to be loaded.

        Raises:
            ModelNotFoundError: it was removed from the catalog.
            UnavailableError: it failed a short while ago.
        """
        if entry.name in self._stopped:
            return False
        state = self._registry.state(entry.name)
        wait_s = self._failed.get(entry.name, -math.inf) + RETRY_S - time.monotonic()
        if state is State.FAILED and wait_s > 0:
            reason = self._registry.describe(entry.name).reason
            raise UnavailableError(
                f"model {entry.name!r} is failed: {reason}", retry_after_s=wait_s
            )
        return state is not State.READY or not self._memory.are_loaded(entry.trunks)

    async def load(self, name: str) -> None:
        """Load a model, whatever is known of it.

        Raises:
            ServiceError: it does not load.
        """
        await self._in_loader(self._load, name)

    async def load_missing(self, entry: ModelEntry) -> None:
        """Load a model for which there is room, if it is not loaded.

        Raises:
            ModelNotFoundError: as `is_missing`.
            ServiceError: it does not load, or failed a short while ago.
        """
        if not self.is_missing(entry):
            return
        async with self._locks.setdefault(entry.name, asyncio.Lock()):
            if self.is_missing(entry):  # nobody else has tried meanwhile
                await self._try(entry.name)

    async def _try(self, name: str) -> None:
        try:
            await self.load(name)
        except ServiceError as error:
            self._failed[name] = time.monotonic()
            error.retry_after_s = error.retry_after_s or RETRY_S
            raise
        self._failed.pop(name, None)

    def first_on(self, trunk: str) -> ModelEntry | None:
        """The model that a trunk is loaded with, if there is one: one that is loaded already, or
        else one that did not fail, and that needs no other trunk."""
        may_load = self._registry.declared - self._stopped
        on_trunk = [e for e in list(self._registry.catalog.models.values()) if trunk in e.trunks]
        return min(
            (entry for entry in on_trunk if entry.name in may_load),
            key=lambda e: (not is_ready(self._registry, e), e.name in self._failed, len(e.trunks)),
            default=None,
        )
