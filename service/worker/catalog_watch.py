"""Watches the catalog, and applies its changes while requests are served."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence, Set
from functools import partial
from itertools import islice
from typing import Any

from models.catalog import Catalog, load_catalog
from models.catalog_changes import Edition, changes
from models.description import State
from models.errors import CatalogError, ModelNotFoundError
from models.registry import Registry
from service.errors import ServiceError
from service.garbage import leave_out_old_objects, look_at_all_objects
from service.metrics import Metrics

logger = logging.getLogger(__name__)

# Changes that failed are tried again after this time, or once the catalog changes again.
RETRY_S = 300.0
# Gateways name the default model to workers. How long they have to learn of another one.
SWITCH_S = 3.0


class CatalogWatch:
    """Keeps a registry in step with its catalog's file, folder or URL.

    The parts of a change are applied one by one. A part that does not load is rolled back: what was
    served before goes on, and the others are applied all the same.

    Attributes:
        failures: why models are not as the catalog says, by their names.
        error: why the catalog cannot be read, or its last change not be applied; "" if all is well.
        applying: whether a change is being applied.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        startup: Sequence[str],
        interval_s: float,
        in_loader: Callable[..., Awaitable[Any]],
        after: Callable[[], None],
        on_change: Callable[[str], None],
        metrics: Metrics,
    ) -> None:
        """
        Args:
            startup: the models that are loaded, instead of the catalog's own list, if any.
            in_loader: runs a function in the loader's thread.
            after: called in the loader's thread once a change has been applied.
            on_change: called with the name of a model whose failure is new, or is no more.
        """
        self._registry = registry
        self._startup = startup
        self._interval_s = interval_s
        self._in_loader = in_loader
        self._after = after
        self._on_change = on_change
        self._updates = metrics.catalog_updates
        self._applied = Edition.of(registry.catalog)
        self._tried = Edition(dict(self._applied.trunks), dict(self._applied.models))
        self.failures: dict[str, str] = {}
        self.error = ""
        self.applying = False
        # The failures of the change that is being applied.
        self._failed: dict[str, str] = {}
        # Whether it has replaced, removed or loaded something.
        self._makes_garbage = False
        # Why the last change could not be applied, if it did not end as expected.
        self._broken = ""

    async def run(self) -> None:
        """Watch until cancelled."""
        seen, tried_at = self._tried, time.monotonic()
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                catalog, edition = await asyncio.to_thread(self._read)
            except Exception as error:
                self._refuse(error)
                continue
            self.error = self._broken
            # A file that is being written is not what it was at the last look.
            settled, seen = edition == seen, edition
            failed = self.failures or self._broken
            again = failed and time.monotonic() >= tried_at + RETRY_S
            if settled and (edition != self._tried or again):
                self._tried, tried_at = edition, time.monotonic()
                await self._apply(catalog, edition)

    def _read(self) -> tuple[Catalog, Edition]:
        catalog = load_catalog(self._registry.catalog.location)
        if missing := set(self._startup) - catalog.models.keys():
            raise CatalogError(f"no model {', '.join(sorted(missing))}, which is to be loaded")
        return catalog, Edition.of(catalog)

    def _refuse(self, error: Exception) -> None:
        text = str(error) or type(error).__name__
        if text != self.error:  # not with each look
            unexpected = None if isinstance(error, CatalogError | OSError) else error
            message = "the catalog cannot be read, what it was before is served: %s"
            logger.error(message, text, exc_info=unexpected)
            self._updates.labels("error").inc()
        self.error = text

    async def _apply(self, catalog: Catalog, edition: Edition) -> None:
        logger.info("the catalog has changed")
        self._failed, self._makes_garbage = {}, False
        self._broken, self.applying = "", True
        try:
            postponed = await self._apply_parts(catalog, edition)
            self._note(postponed | self._failed)
        except Exception as error:
            logger.exception("a change of the catalog could not be applied")
            reason = str(error) or type(error).__name__
            self._broken = f"a change could not be applied: {reason}"
            self.failures |= self._failed
        finally:
            self.applying = False
        self.error = self._broken
        self._updates.labels("error" if self.failures or self._broken else "ok").inc()

    async def _apply_parts(self, catalog: Catalog, edition: Edition) -> dict[str, str]:
        """Returns the models that are not the defaults yet, and why."""
        # In the loader, so that what loads at start has been loaded by then.
        before = await self._in_loader(self._states, edition.models)
        applied, defaults = self._applied, {*self._registry.catalog.defaults.values()}
        await self._in_loader(self._settle_defaults, catalog)
        await self._remove(edition, but=defaults)
        for change in changes(applied, edition):
            update = partial(self._registry.update, change.trunks, change.models)
            if await self._try(update, change.models, change.trunks):
                applied.trunks |= {name: edition.trunks[name] for name in change.trunks}
                applied.models |= {name: edition.models[name] for name in change.models}
                some = ", ".join(islice([*change.trunks, *change.models], 10))
                logger.info("%d models are as in the catalog: %s", len(change.models), some)
        for name in self._startup or catalog.startup:
            if before[name] in (None, State.FAILED) and self.state(name) is not State.READY:
                await self._try(partial(self._registry.load, name), [name])
        postponed: dict[str, str] = await self._in_loader(self._settle_defaults, catalog)
        still = {*self._registry.catalog.defaults.values()}
        if (defaults - still) & (applied.models.keys() - edition.models.keys()):
            await asyncio.sleep(SWITCH_S)
        await self._remove(edition, but=still)
        if self._makes_garbage:
            await self._in_loader(_collect)
        await self._in_loader(self._after)
        return postponed

    def _note(self, failures: dict[str, str]) -> None:
        old, self.failures = self.failures, failures
        for name in old.keys() | failures.keys():
            self._on_change(name)

    async def _remove(self, edition: Edition, but: Set[str]) -> None:
        """Remove what an edition does not have, but for some models, and trunks that are used."""
        applied = self._applied
        for name in applied.models.keys() - edition.models.keys() - but:
            # It is gone already if what follows its removal failed before.
            gone = self.state(name) is None
            if gone or await self._try(partial(self._registry.remove, name), [name]):
                del applied.models[name]
                logger.info("model %s was removed", name)
        used = {trunk for entry, _ in applied.models.values() for trunk in entry.trunks}
        for name in applied.trunks.keys() - edition.trunks.keys() - used:
            if await self._try(partial(self._registry.remove_trunk, name), [], [name]):
                del applied.trunks[name]

    async def _try(
        self, work: Callable[[], object], models: Collection[str], trunks: Collection[str] = ()
    ) -> bool:
        """Do a part of a change. Returns whether it was done; if not, all is as before.

        Args:
            models: the models that it changes.
            trunks: the trunks that it changes.
        """

        def is_loaded() -> bool:
            loaded = any(self._registry.loaded_trunk(name) is not None for name in trunks)
            return loaded or any(self.state(name) is State.READY for name in models)

        def change() -> None:
            if is_loaded():
                self._makes_garbage = True
                look_at_all_objects()
            work()
            self._makes_garbage |= is_loaded()

        try:
            await self._in_loader(change)
            return True
        except ServiceError as error:
            names = ", ".join(islice(models, 10))
            logger.error("a change of the catalog was rolled back: %s: %s", names, error.detail)
            self._failed |= dict.fromkeys(models, error.detail)
        # Only now: the error's traceback refers to what had been built.
        await self._in_loader(_collect)
        return False

    def _settle_defaults(self, catalog: Catalog) -> dict[str, str]:
        """Let the catalog's default models serve their tasks, once they are ready. Returns those
        that are not while older ones are, with what happens instead."""
        chosen: dict[str, str] = {}
        postponed: dict[str, str] = {}
        for task, name in catalog.defaults.items():
            old = self._registry.catalog.defaults.get(task, name)
            if self.state(name) is not State.READY and self.state(old) is State.READY:
                chosen[task] = old
                if old not in catalog.models:
                    postponed[old] = f"it was removed, but serves {task} until {name!r} is ready"
                postponed[name] = f"it is not ready, so {old!r} is still the default for {task}"
            elif self.state(name) is not None:
                chosen[task] = name
        self._registry.set_defaults(chosen, catalog.startup)
        return postponed

    def _states(self, names: Iterable[str]) -> dict[str, State | None]:
        return {name: self.state(name) for name in names}

    def state(self, name: str) -> State | None:
        """A model's state; None if there is no such model."""
        try:
            return self._registry.state(name)
        except ModelNotFoundError:
            return None


def _collect() -> None:
    """Free what is garbage now, and leave the rest out of collections."""
    look_at_all_objects()
    leave_out_old_objects()
