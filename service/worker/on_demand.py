"""Models that are loaded when a request asks for them, within a memory budget."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from models.catalog import ModelEntry
from models.description import State
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
from service.worker.pipeline import until
from service.worker.trunk_sizes import MIB, TrunkSizes

logger = logging.getLogger(__name__)

# Most models that wait to be loaded or are being loaded for requests.
MAX_LOADS = 4
# A model that did not load is tried again after this time.
RETRY_S = 60.0
# How often the trunks of fits are looked after.
INTERVAL_S = 5.0


class OnDemand:
    """Loads models when they are asked for, and unloads others to stay within a budget.

    Trunks are unloaded with all models on them, those that were asked for least recently first.
    A trunk stays while a request for it runs, while a head is fitted on it, and if a model that is
    loaded at start uses it. Where nothing can be unloaded, one model may exceed the budget.
    """

    def __init__(
        self,
        registry: Registry,
        budget_mb: int,
        *,
        startup: Callable[[], Sequence[str]],
        fitted_on: Callable[[], Collection[str]],
        in_loader: Callable[..., Awaitable[Any]],
        load: Callable[[str], None],
        unload: Callable[[Sequence[str]], None],
    ) -> None:
        """
        Args:
            budget_mb: MiB; 0: no model is loaded on demand.
            startup: the models that stay loaded.
            fitted_on: the trunks that heads are being fitted on.
            in_loader: runs a function in the loader's thread.
            load, unload: a model, and several, in the loader's thread.
        """
        self._registry = registry
        self._budget = budget_mb * MIB
        self._startup = startup
        self._fitted_on = fitted_on
        self._in_loader = in_loader
        self._load = load
        self._unload = unload
        self._sizes = TrunkSizes(registry)
        # Protects the next two, so that a trunk is not unloaded once a request has it.
        self._lock = threading.Lock()
        # The number of requests that use each trunk or wait for it, in the order of its last use.
        self._users: dict[str, int] = {}
        # Trunks that are being unloaded.
        self._leaving: set[str] = set()
        # Models that an admin unloaded.
        self._stopped: set[str] = set()
        # When models did not load, in `time.monotonic` seconds.
        self._failed: dict[str, float] = {}
        # Loads, and the latest deadline of those who wait for each.
        self._loads: dict[str, asyncio.Future[None]] = {}
        self._deadlines: dict[str, float] = {}
        if budget_mb:  # otherwise it would depend on what others have had loaded
            registry.choose_defaults_among(self._stays)

    @asynccontextmanager
    async def loaded(self, calls: Sequence[Call], deadline: float) -> AsyncIterator[None]:
        """Load the models of a request's calls, and keep them loaded within the context.

        Raises:
            ServiceError: one does not load, or not by the deadline; too many are being loaded; or
                there is no room for them.
        """
        if not self._budget:
            yield
            return
        try:
            entries = [model_entry(self._registry, call) for call in calls]
        except ModelsError as error:
            raise from_library(error) from error
        trunks = {trunk for entry in entries for trunk in entry.trunks}
        self._use(trunks, 1)
        try:
            await self._ensure(entries, deadline)
            yield
        finally:
            self._use(trunks, -1)

    async def run(self) -> None:
        """Load the trunks that fits wait for after a restart, until cancelled."""
        if not self._budget:
            return
        await self._in_loader(self._check_startup)
        while True:
            for trunk in self._fitted_on():
                if (entry := self._first_on(trunk)) and not self._registry.loaded_trunk(trunk):
                    with suppress(ServiceError):  # it is tried again
                        await self._ensure([entry], math.inf)
            await asyncio.sleep(INTERVAL_S)

    def allow(self, name: str) -> None:
        """Note that an admin loads a model."""
        self._stopped.discard(name)
        if name in self._registry.catalog.models:
            self._use(self._registry.catalog.models[name].trunks, 0)

    def stop(self, name: str) -> None:
        """Note that an admin unloads a model. It is not loaded on demand from now on."""
        if name in self._registry.catalog.models:
            self._stopped.add(name)

    # -- on the event loop -----------------------------------------------------------------

    def _use(self, trunks: Collection[str], change: int) -> None:
        with self._lock:
            for trunk in trunks:
                self._users[trunk] = self._users.pop(trunk, 0) + change

    def _first_on(self, trunk: str) -> ModelEntry | None:
        """A model on a trunk that may be loaded, if there is one."""
        may_load = self._registry.declared - self._stopped
        on_trunk = [e for e in list(self._registry.catalog.models.values()) if trunk in e.trunks]
        return next((entry for entry in on_trunk if entry.name in may_load), None)

    async def _ensure(self, entries: Sequence[ModelEntry], deadline: float) -> None:
        try:
            async with until(deadline):
                while True:
                    self._check_fit(entries)
                    missing = (entry.name for entry in entries if self._is_missing(entry))
                    if (name := next(missing, None)) is None:
                        return
                    await self._load_once(name, deadline)
        except TimeoutError as error:
            raise DeadlineExceededError("the deadline passed before a model was loaded") from error
        except ModelsError as error:
            raise from_library(error) from error

    def _check_fit(self, entries: Sequence[ModelEntry]) -> None:
        """Refuse models that do not fit together, as far as their sizes are known."""
        trunks = {trunk for entry in entries for trunk in entry.trunks}
        if any(trunks.issubset(entry.trunks) for entry in entries):
            return  # one model is loaded even if it does not fit
        kept = self._trunks_of(self._startup())
        fits = self._sizes.total(trunks | kept) <= self._budget
        if not fits and not any((trunks - kept).issubset(entry.trunks) for entry in entries):
            names = ", ".join(list(dict.fromkeys(entry.name for entry in entries))[:10])
            raise UnavailableError(
                f"the models of this request do not fit into {self._budget // MIB} MiB together: "
                f"{names}; ask for them one by one",
                retry_after_s=LOADING_RETRY_AFTER_S,
            )

    def _is_missing(self, entry: ModelEntry) -> bool:
        """Whether a model is to be loaded.

        Raises:
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
        return state is not State.READY or not self._leaving.isdisjoint(entry.trunks)

    async def _load_once(self, name: str, deadline: float) -> None:
        """Load a model, or wait for its load. After a deadline it may not be loaded."""
        self._deadlines[name] = max(deadline, self._deadlines.get(name, deadline))
        if (load := self._loads.get(name)) is None:
            if len(self._loads) >= MAX_LOADS:
                del self._deadlines[name]
                raise QueueFullError(
                    f"{MAX_LOADS} models are being loaded; try again later",
                    retry_after_s=LOADING_RETRY_AFTER_S,
                )
            load = self._loads[name] = asyncio.ensure_future(self._in_loader(self._work, name))
            load.add_done_callback(lambda done: self._done(name, done))
        try:
            await asyncio.shield(load)  # others may wait for it, too
        except ServiceError as error:
            error.retry_after_s = error.retry_after_s or RETRY_S
            raise

    def _done(self, name: str, load: "asyncio.Future[None]") -> None:
        del self._loads[name], self._deadlines[name]
        if not load.cancelled():
            load.exception()  # those who waited until their deadline do not read it

    # -- in the loader's thread ------------------------------------------------------------

    def _work(self, name: str) -> None:
        expired = self._deadlines[name] <= time.monotonic()
        if expired or name in self._stopped or self._is_ready(name):
            return
        entry = self._registry.catalog.model(name)
        self._make_room(entry)
        try:
            self._load(name)
        except BaseException:
            self._failed[name] = time.monotonic()
            raise
        self._failed.pop(name, None)
        self._unload_until(self._budget, entry)  # its size may not have been known

    def _make_room(self, entry: ModelEntry) -> None:
        """
        Raises:
            UnavailableError: the budget is exceeded already, and nothing can be unloaded.
        """
        loaded = self._sizes.loaded()
        if loaded.issuperset(entry.trunks):
            return
        self._unload_until(self._budget - self._sizes.expected(entry), entry)
        loaded = self._sizes.loaded()
        others = loaded - self._trunks_of([*self._startup(), entry.name])
        if others and self._sizes.total(loaded) > self._budget:
            raise UnavailableError(
                f"no room for {entry.name!r}: requests or fits use all other models that are "
                "loaded; try again later",
                retry_after_s=LOADING_RETRY_AFTER_S,
            )

    def _unload_until(self, most: int, entry: ModelEntry) -> None:
        """Unload trunks that nobody uses until the others have at most these bytes, if possible."""
        kept = self._trunks_of([*self._startup(), entry.name]).union(self._fitted_on())
        while self._sizes.total(loaded := self._sizes.loaded()) > most:
            with self._lock:
                order = {trunk: place for place, trunk in enumerate(self._users)}
                idle = [t for t in loaded - kept if not self._users.get(t)]
                if not idle:
                    return
                trunk = min(idle, key=lambda name: order.get(name, -1))
                self._leaving.add(trunk)
            try:
                models = list(self._registry.catalog.models.items())
                on_trunk = [name for name, each in models if trunk in each.trunks]
                ready = [name for name in on_trunk if self._is_ready(name)]
                self._unload(ready)
            finally:
                self._leaving.discard(trunk)
            kept.add(trunk)

    def _stays(self, entry: ModelEntry) -> bool:
        return self._trunks_of(self._startup()).issuperset(entry.trunks)

    def _is_ready(self, name: str) -> bool:
        return self._registry.state(name) is State.READY

    def _trunks_of(self, names: Sequence[str]) -> set[str]:
        models = self._registry.catalog.models
        entries = [models[name] for name in names if name in models]
        return {trunk for entry in entries for trunk in entry.trunks}

    def _check_startup(self) -> None:
        names = self._startup()
        size = self._sizes.total(self._trunks_of(names))
        if size > self._budget:
            logger.warning(
                "models that are loaded at start have %d MiB, more than VITRAIL_MODEL_MEMORY_MB",
                size // MIB,
            )
        if self._registry.declared.issubset(names):
            logger.warning(
                "all models are loaded at start and stay loaded; name some in `startup` or "
                "VITRAIL_MODELS, and VITRAIL_MODEL_MEMORY_MB loads the others on demand"
            )
