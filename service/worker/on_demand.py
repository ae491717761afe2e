"""Models that are loaded when a request asks for them, within a memory budget.

Requests whose models are loaded go on at once. Others wait for their trunks' turn, in the order in
which trunks were first asked for: room is made, the models are loaded, and everyone who waits for
them goes on. So a model that is always busy cannot keep the others out. All of this is on the event
loop; only loading and unloading themselves are in the loader's thread.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from models.catalog import ModelEntry
from models.errors import ModelsError
from models.registry import Registry
from service.errors import (
    LOADING_RETRY_AFTER_S,
    DeadlineExceededError,
    QueueFullError,
    ServiceError,
    UnavailableError,
    from_library,
)
from service.types import Call
from service.worker.execution_plan import model_entry
from service.worker.memory_budget import MemoryBudget
from service.worker.model_loads import RETRY_S, ModelLoads
from service.worker.pipeline import until

logger = logging.getLogger(__name__)

# Most trunks, or groups of them that one request needs, that requests wait for.
MAX_WAITING = 32
# How often the trunks of fits are looked after, and memory that is still beyond the budget.
INTERVAL_S = 5.0
STOPPING = "the server is stopping"


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    """A request that waits for models."""

    entries: Sequence[ModelEntry]
    loaded: "asyncio.Future[None]"


class OnDemand:
    """Loads models when they are asked for, see `MemoryBudget` for what makes room."""

    def __init__(
        self,
        registry: Registry,
        budget_mb: int,
        *,
        startup: Callable[[], Sequence[str]],
        fitted_on: Callable[[], Collection[str]],
        head_bytes: Callable[[str], int],
        in_loader: Callable[..., Awaitable[Any]],
        load: Callable[[str], None],
        unload: Callable[[Sequence[str]], None],
    ) -> None:
        """
        Args:
            budget_mb: MiB; 0: no model is loaded on demand.
            load: loads a model, in the loader's thread.
            startup, fitted_on, head_bytes, in_loader, unload: as for `MemoryBudget`.
        """
        self._registry = registry
        self._is_on = budget_mb > 0
        self._fitted_on = fitted_on
        self._in_loader = in_loader
        self._memory = MemoryBudget(
            registry, budget_mb, startup=startup, fitted_on=fitted_on, head_bytes=head_bytes,
            in_loader=in_loader, unload=unload,
        )  # fmt: skip
        self._models = ModelLoads(registry, self._memory, in_loader, load)
        # By the trunks they need, those that were asked for first at the front.
        self._queue: dict[frozenset[str], list[_Waiter]] = {}
        self._arrived = asyncio.Event()  # set when a request begins to wait
        self._closed = False  # True once nobody serves those who wait
        if budget_mb:  # otherwise it would depend on what others have had loaded
            registry.choose_defaults_among(self._memory.stays)

    def loads(self, name: str) -> bool:
        """Whether a request for a model of the catalog would load it, if it is not loaded."""
        return self._is_on and self._models.may_load(name)

    @asynccontextmanager
    async def loaded(self, calls: Sequence[Call], deadline: float) -> AsyncIterator[None]:
        """Load the models of a request's calls, and keep them loaded within the context.

        Raises:
            ServiceError: one does not load, or not by the deadline; too many are waited for; or
                there is no room for them.
        """
        if not self._is_on:
            yield
            return
        try:
            entries = [model_entry(self._registry, call) for call in calls]
        except ModelsError as error:
            raise from_library(error) from error
        async with self._holding(entries, deadline):
            yield

    @asynccontextmanager
    async def trunk_loaded(self, find: Callable[[], str]) -> AsyncIterator[None]:
        """Load a trunk with a model on it, if one may be loaded, and keep it within the context.

        Args:
            find: returns the trunk's name. It runs in a thread, if models are loaded on demand.

        Raises:
            ServiceError: as `loaded`.
        """
        entry = self._models.first_on(await asyncio.to_thread(find)) if self._is_on else None
        async with self._holding([entry] if entry else [], math.inf):
            yield

    async def load(self, name: str) -> None:
        """Load a model for an admin.

        Raises:
            ServiceError: as `loaded`.
        """
        self._models.allow(name)
        if self._is_on:
            async with self.loaded([Call(name, None)], math.inf):
                return
        await self._models.load(name)

    def stop(self, name: str) -> None:
        """Note that an admin unloads a model. It is not loaded on demand from now on."""
        if name in self._registry.catalog.models:
            self._models.stop(name)

    async def run(self) -> None:
        """Serve those who wait, until cancelled."""
        if not self._is_on:
            return
        try:
            await self._in_loader(self._memory.check_startup)
            while True:
                self._arrived.clear()
                try:
                    while self._queue:
                        await self._serve(next(iter(self._queue)))
                    await self._load_for_fits()
                    await self._memory.tidy()
                except Exception:  # the next round goes on
                    logger.exception("loading models on demand failed")
                if not self._queue:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(INTERVAL_S):
                            await self._arrived.wait()
        finally:
            self._closed = True
            for waiters in self._queue.values():
                _fail(waiters, UnavailableError(STOPPING, retry_after_s=1))

    # -- requests --------------------------------------------------------------------------

    @asynccontextmanager
    async def _holding(self, entries: Sequence[ModelEntry], deadline: float) -> AsyncIterator[None]:
        trunks = frozenset(trunk for entry in entries for trunk in entry.trunks)
        try:
            async with until(deadline):
                is_missing = self._models.is_missing
                if self._memory.are_loaded(trunks) or not any(map(is_missing, entries)):
                    await self._use(entries, trunks)
                else:
                    await self._wait(entries, trunks)
        except TimeoutError as error:
            names = ", ".join(dict.fromkeys(repr(entry.name) for entry in entries))
            raise DeadlineExceededError(
                f"the deadline passed while a model waited for memory or was loading: {names}"
            ) from error
        except ModelsError as error:
            raise from_library(error) from error
        try:
            yield
        finally:
            self._memory.release(trunks)

    async def _use(self, entries: Sequence[ModelEntry], trunks: frozenset[str]) -> None:
        """Use trunks that are loaded, and load the models on them that are not."""
        self._memory.use(trunks)
        try:
            for entry in entries:
                await self._models.load_missing(entry)
        except BaseException:
            self._memory.release(trunks)
            raise

    async def _wait(self, entries: Sequence[ModelEntry], trunks: frozenset[str]) -> None:
        """Wait until models are loaded. Their trunks are in use then."""
        if self._closed:
            raise UnavailableError(STOPPING, retry_after_s=1)
        self._memory.check_fit(entries)
        if trunks not in self._queue and len(self._queue) >= MAX_WAITING:
            raise QueueFullError(
                f"{MAX_WAITING} other models wait to be loaded; try again later",
                retry_after_s=LOADING_RETRY_AFTER_S,
            )
        waiter = _Waiter(entries, asyncio.get_running_loop().create_future())
        self._queue.setdefault(trunks, []).append(waiter)
        self._arrived.set()
        try:
            await waiter.loaded
        except BaseException:
            loaded = waiter.loaded
            if loaded.done() and not loaded.cancelled() and loaded.exception() is None:
                self._memory.release(trunks)  # it got them at the same moment
            loaded.cancel()
            self._memory.wake()
            raise

    # -- those who wait --------------------------------------------------------------------

    async def _serve(self, trunks: frozenset[str]) -> None:
        """Make room for trunks, and let those go on who wait for models on them."""
        waiters = self._queue[trunks]
        try:
            await self._memory.make_room(
                trunks, lambda: any(not waiter.loaded.done() for waiter in waiters)
            )
            for waiter in waiters:  # others may come meanwhile
                await self._serve_one(waiter, trunks)
        except Exception as error:
            if not isinstance(error, ServiceError):
                logger.exception("models on %s could not be loaded", ", ".join(sorted(trunks)))
                error = UnavailableError("the model could not be loaded", retry_after_s=RETRY_S)
            _fail(waiters, error)
        del self._queue[trunks]  # not if cancelled: `run` tells all who are in the queue
        await self._memory.correct(trunks)

    async def _serve_one(self, waiter: _Waiter, trunks: frozenset[str]) -> None:
        try:
            for entry in waiter.entries:
                if not waiter.loaded.done():
                    await self._models.load_missing(entry)
        except (ServiceError, ModelsError) as error:
            _fail([waiter], from_library(error) if isinstance(error, ModelsError) else error)
        if not waiter.loaded.done():
            self._memory.use(trunks)
            waiter.loaded.set_result(None)

    async def _load_for_fits(self) -> None:
        """Load the trunks that fits wait for after a restart."""
        for trunk in self._fitted_on():
            if (entry := self._models.first_on(trunk)) and not self._registry.loaded_trunk(trunk):
                with suppress(ServiceError, ModelsError):  # it is tried again
                    if self._models.is_missing(entry):  # otherwise no room is needed
                        await self._memory.make_room(frozenset(entry.trunks), lambda: True)
                        await self._models.load_missing(entry)


def _fail(waiters: Sequence[_Waiter], error: ServiceError) -> None:
    for waiter in waiters:
        if not waiter.loaded.done():
            waiter.loaded.set_exception(error)
