"""The memory of the trunks that are loaded on demand: who uses them, and which make room."""

import logging
import math
import time
from asyncio import Event
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence, Set
from contextlib import suppress
from typing import Any

from models.catalog import ModelEntry
from models.description import State
from models.errors import ModelNotFoundError
from models.registry import Registry
from service.errors import LOADING_RETRY_AFTER_S, UnavailableError
from service.worker.trunk_sizes import MIB, TrunkSizes

logger = logging.getLogger(__name__)

# How long a trunk that does not fit into the budget stays after its last request.
IDLE_S = 30.0


class MemoryBudget:
    """Unloads trunks to stay within a budget, with all models on them.

    The trunk that was used least recently goes first, and one that no request uses before one that
    is in use: that one gets no further requests until those that use it have ended. A trunk stays
    while a head is fitted on it, and if a model that is loaded at start uses it. Where nothing can
    be unloaded, one model may exceed the budget.

    Attributes:
        leaving: the trunk that is to be unloaded once nobody uses it.
    """

    def __init__(
        self,
        registry: Registry,
        budget_mb: int,
        *,
        startup: Callable[[], Sequence[str]],
        fitted_on: Callable[[], Collection[str]],
        head_bytes: Callable[[str], int],
        in_loader: Callable[..., Awaitable[Any]],
        unload: Callable[[Sequence[str]], None],
    ) -> None:
        """
        Args:
            budget_mb: MiB.
            startup: the models that stay loaded.
            fitted_on: the trunks that heads are being fitted on.
            head_bytes: bytes of the loaded heads on a trunk.
            in_loader: runs a function in the loader's thread.
            unload: unloads models, in the loader's thread.
        """
        self._registry = registry
        self._budget = budget_mb * MIB
        self._startup = startup
        self._fitted_on = fitted_on
        self._in_loader = in_loader
        self._unload = unload
        self._sizes = TrunkSizes(registry, head_bytes)
        self.leaving: str | None = None
        # The number of requests that use each trunk now.
        self._users: Counter[str] = Counter()
        # When requests last began or ceased to use each trunk, in `time.monotonic` seconds.
        self._used: dict[str, float] = {}
        # The trunks that may be unloaded once nobody uses them.
        self._victims: Set[str] = frozenset()
        # Set when nobody uses one of those any more, or a request ceases to wait for a trunk.
        self._ceased = Event()

    def are_loaded(self, trunks: Collection[str]) -> bool:
        """Whether trunks are loaded and stay so once they are in use."""
        loaded = all(self._registry.loaded_trunk(trunk) is not None for trunk in trunks)
        return loaded and self.leaving not in trunks

    @property
    def in_use(self) -> set[str]:
        """The trunks that requests use now."""
        return {trunk for trunk, users in self._users.items() if users > 0}

    def use(self, trunks: Collection[str]) -> None:
        """Note that a request uses trunks, which are loaded."""
        self._users.update(trunks)
        self._used |= dict.fromkeys(trunks, time.monotonic())

    def release(self, trunks: Collection[str]) -> None:
        """Note that a request uses trunks no more."""
        self._users.subtract(trunks)
        self._used |= dict.fromkeys(trunks, time.monotonic())
        if any(trunk in self._victims and self._users[trunk] <= 0 for trunk in trunks):
            self._ceased.set()

    def wake(self) -> None:
        """Note that a request waits no more."""
        self._ceased.set()

    def check_fit(self, entries: Sequence[ModelEntry]) -> None:
        """Refuse models that do not fit together, as far as their sizes are known.

        Raises:
            UnavailableError: they do not.
        """
        trunks, kept = _trunks_of(entries), self._startup_trunks()
        if any((trunks - kept).issubset(entry.trunks) for entry in entries):
            return  # one model is loaded even if it does not fit
        if self._sizes.total(trunks | kept) > self._budget:
            names = ", ".join(list(dict.fromkeys(entry.name for entry in entries))[:10])
            raise UnavailableError(
                f"the models of this request do not fit into {self._budget // MIB} MiB together: "
                f"{names}; ask for them one by one",
                retry_after_s=LOADING_RETRY_AFTER_S,
            )

    def stays(self, entry: ModelEntry) -> bool:
        """Whether a model is on trunks of models that are loaded at start."""
        return self._startup_trunks().issuperset(entry.trunks)

    async def make_room(self, trunks: frozenset[str], is_wanted: Callable[[], bool]) -> None:
        """Unload what must go before trunks are loaded. Returns early if they are not wanted.

        Raises:
            UnavailableError: the budget is exceeded already, and nothing can be unloaded.
        """
        kept = trunks | self._startup_trunks()
        await self._unload_until(self._budget - self._sizes.expected(trunks), kept, is_wanted)
        loaded = self._sizes.loaded()
        is_over = loaded - kept and self._sizes.total(loaded) > self._budget
        if is_over and not trunks <= loaded and is_wanted():
            raise UnavailableError(
                "no room for the model: heads are being fitted on all others that are loaded; try "
                "again later",
                retry_after_s=LOADING_RETRY_AFTER_S,
            )

    async def correct(self, trunks: frozenset[str]) -> None:
        """Unload others once trunks are loaded, since their sizes may not have been known."""
        await self._unload_until(self._budget, trunks | self._startup_trunks(), lambda: True)

    async def tidy(self) -> None:
        """Unload what is beyond the budget and has not been used for a while."""
        since = time.monotonic() - IDLE_S
        recent = {trunk for trunk, used in self._used.items() if used > since}
        kept = self.in_use | recent | self._startup_trunks()
        await self._unload_until(self._budget, kept, lambda: True)

    def check_startup(self) -> None:
        """Warn if no model can be loaded within the budget, or none needs to be."""
        size = self._sizes.total(self._startup_trunks())
        if size > self._budget:
            logger.warning(
                "models that are loaded at start have %d MiB, more than VITRAIL_MODEL_MEMORY_MB",
                size // MIB,
            )
        if self._registry.declared.issubset(self._startup()):
            logger.warning(
                "all models are loaded at start and stay loaded; name some in `startup` or "
                "VITRAIL_MODELS, and VITRAIL_MODEL_MEMORY_MB loads the others on demand"
            )

    async def _unload_until(self, most: int, kept: Set[str], is_wanted: Callable[[], bool]) -> None:
        """Unload trunks until the others have at most these bytes, if possible."""
        try:
            while is_wanted() and self._sizes.total(loaded := self._sizes.loaded()) > most:
                victims = loaded - kept - self._needed_for_fits()
                if not victims:
                    return
                idle = victims - self.in_use
                self.leaving = min(idle or victims, key=lambda t: self._used.get(t, -math.inf))
                self._victims = victims
                self._ceased.clear()
                if idle:
                    await self._in_loader(self._evict, self.leaving)
                    kept = kept | {self.leaving}
                else:
                    await self._ceased.wait()
        finally:
            self.leaving, self._victims = None, frozenset()

    def _evict(self, trunk: str) -> None:
        """Unload a trunk, in the loader's thread."""
        if trunk in self._needed_for_fits():  # since it was chosen
            return
        models = list(self._registry.catalog.models.items())
        on_trunk = [name for name, entry in models if trunk in entry.trunks]
        self._unload([n for n in on_trunk if self._registry.state(n) is State.READY])

    def _needed_for_fits(self) -> set[str]:
        """The trunks that heads are fitted on, and the other trunks of loaded models on them: one
        tower of a CLIP goes with the other."""
        fitted = set(self._fitted_on())
        if not fitted:
            return fitted
        names = list(self._registry.declared)  # heads have one trunk
        declared = filter(None, map(self._registry.catalog.models.get, names))
        on_fitted = [entry for entry in declared if not fitted.isdisjoint(entry.trunks)]
        return fitted | _trunks_of([e for e in on_fitted if is_ready(self._registry, e)])

    def _startup_trunks(self) -> set[str]:
        models = self._registry.catalog.models
        return _trunks_of([models[name] for name in self._startup() if name in models])


def is_ready(registry: Registry, entry: ModelEntry) -> bool:
    """Whether a model is loaded."""
    with suppress(ModelNotFoundError):  # removed meanwhile
        return registry.state(entry.name) is State.READY
    return False


def _trunks_of(entries: Sequence[ModelEntry]) -> set[str]:
    return {trunk for entry in entries for trunk in entry.trunks}
