"""Loaded models by name, the trunks that they share, and the state of each model."""

import gc
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.assembly import Assembly
from models.catalog import Catalog, ModelEntry, load_catalog
from models.checkpoints.loading import LoadedTrunk, load_trunk
from models.checkpoints.store import Store
from models.describing import describe
from models.description import ModelDescription, State
from models.errors import CatalogError, ModelNotFoundError, ModelNotReadyError
from models.inputs.transforms import resolve_transform
from models.model import Model
from models.placements import Placements
from models.slots import Slot, Slots
from models.trunks.devices import Placement, resolve_device, resolve_precision
from models.trunks.transfers import finish_writes

logger = logging.getLogger(__name__)


Hook = Callable[[Model], None]


class Registry:
    """Loads and unloads a catalog's models. Every method may be called from any thread.

    `on_load` is called with a model that has been built but is not ready yet; a server warms it up
    there. `on_unload` is called with a model that is no longer ready, before its memory is freed.
    `on_change` is called with the name of a model whose description has changed, or that was added
    or removed.

    There may be a hundred thousand heads, so only `describe_all` looks at every model.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        store: Store | None = None,
        device: str = "auto",
        precision: str = "auto",
        engine: str = "eager",
        transform: str = "exact",
        tf32: bool = False,
        threads: int = 0,
        streams: int = 1,
        on_load: Hook | None = None,
        on_unload: Hook | None = None,
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        self._slots = Slots(catalog.models.values(), self._report)
        # `add` and `remove` change its models.
        self.catalog = replace(catalog, models=self._slots.entries)
        self.store = store or Store()
        self.device = resolve_device(device)
        defaults = Placement(
            device=self.device,
            precision=resolve_precision(precision, self.device),
            engine=engine,
            tf32=tf32,
            transform=resolve_transform(transform),
            threads=threads,
            streams=streams,
            cache=self.store.root / "engines",
        )
        self._placements = Placements(catalog, defaults)
        self.on_load = on_load
        self.on_unload = on_unload
        self.on_change = on_change
        self._trunks: dict[str, LoadedTrunk] = {}
        self._trunk_locks = {name: threading.Lock() for name in catalog.trunks}
        self._assembly = Assembly(catalog.path.parent, self.store, self.load_trunk)

    @classmethod
    def from_catalog(cls, name_or_path: str | Path, **options: Any) -> "Registry":
        """A registry of a built-in catalog, by its name, or of a TOML file."""
        return cls(load_catalog(name_or_path), **options)

    def get(self, name: str) -> Model:
        """The model, which is loaded if it is not yet. The same as `load`."""
        return self.load(name)

    def ready(self, name: str) -> Model:
        """The model if it is ready.

        Raises:
            ModelNotFoundError: not in the catalog.
            ModelNotReadyError: in the catalog, but not ready.
        """
        slot = self._slot(name)
        if slot.state is State.READY and slot.model is not None:
            return slot.model
        reason = f": {slot.reason}" if slot.reason else ""
        raise ModelNotReadyError(f"model {name!r} is {slot.state}{reason}", state=slot.state)

    def load(self, name: str) -> Model:
        """Load a model, or wait for a thread that is loading it. Returns a loaded one at once.

        Raises:
            ModelsError: it could not be loaded. Its state is then `failed`, with the reason.
        """
        slot = self._slot(name)
        with slot.lock:
            if slot.model is not None:
                return slot.model
            if self._slots.get(name) is not slot:
                raise ModelNotFoundError(f"model {name!r} was removed meanwhile")
            self._slots.set_state(slot, State.LOADING)
            started = time.monotonic()
            try:
                model = self._build(slot.entry)
                if self.on_load:
                    self.on_load(model)
            except BaseException as error:
                self._slots.set_state(slot, State.FAILED, str(error))
                self._drop_unused_trunks(slot.entry)
                raise
            slot.load_seconds = time.monotonic() - started
            slot.format = self._trunks[slot.entry.trunk].format
            slot.model = model
            self._slots.set_state(slot, State.READY)
            logger.info("model %s loaded in %.1f s", name, slot.load_seconds)
            return model

    def unload(self, name: str) -> None:
        """Unload a model, and its trunks if no other model uses them."""
        slot = self._slot(name)
        with slot.lock:
            model, slot.model = slot.model, None
            self._slots.set_state(slot, State.UNLOADED)
            if model is not None and self.on_unload:
                self.on_unload(model)
            del model  # so that its memory can be freed below
        self._drop_unused_trunks(slot.entry)

    def loaded_trunk(self, name: str) -> LoadedTrunk | None:
        """A trunk that a loaded model uses, or None."""
        return self._trunks.get(name)

    def add(self, entry: ModelEntry) -> None:
        """Declare a model that is not in the catalog's file. A loaded model of that name, on the
        same trunk, serves until the new one is loaded and replaces it.

        Raises:
            CatalogError: the trunk does not exist, or a loaded model of that name uses another.
            ModelsError: the replacement does not load. The old model remains.
        """
        if entry.trunk not in self.catalog.trunks:
            trunks = ", ".join(self.catalog.trunks)
            raise CatalogError(f"{entry.name}: no trunk {entry.trunk!r}; the catalog has {trunks}")
        slot, old = Slot(entry), self._slots.get(entry.name)
        if old is not None and old.model is not None:
            if old.entry.trunk != entry.trunk:
                raise CatalogError(f"{entry.name} uses {old.entry.trunk!r}; remove it first")
            slot.model, slot.state = self._build(entry), State.READY
            slot.format, slot.load_seconds = old.format, old.load_seconds
        self._slots.put(slot)

    def remove(self, name: str) -> None:
        """Unload a model, and remove its declaration."""
        slot = self._slot(name)
        self.unload(name)
        self._slots.remove(slot)

    def default_model(self, task: str) -> ModelEntry:
        """The catalog's default model for a task, otherwise the first loaded model that does it.

        Raises:
            ModelNotFoundError: no model does the task.
        """
        first = self._slots.first(task)
        if task not in self.catalog.defaults and first is not None:
            return first
        return self.catalog.default_model(task)

    def names(self, start: int = 0, count: int | None = None) -> list[str]:
        """Names of models, in the catalog's order: `count` from place `start` on, or all."""
        return self._slots.names(start, count)

    def states(self) -> Mapping[State, int]:
        """The number of models in each state."""
        return self._slots.states()

    def state(self, name: str) -> State:
        """The state of a model that is in the catalog."""
        return self._slot(name).state

    def describe(self, name: str) -> ModelDescription:
        """A model's description: from the catalog, and from the weights once they are loaded.

        Raises:
            ModelNotFoundError: not in the catalog.
        """
        return self._describe(self._slot(name))

    def describe_all(self) -> dict[str, ModelDescription]:
        """Every model's description by name, in the catalog's order."""
        slots = map(self._slots.get, self._slots.names())
        return {slot.entry.name: self._describe(slot) for slot in slots if slot is not None}

    def _describe(self, slot: Slot) -> ModelDescription:
        trunk = self.catalog.trunks[slot.entry.trunk]
        precision = self._placements.precision(trunk)
        default_for = self._default_for(slot.entry.name)
        return describe(slot, trunk, default_for, str(self.device), precision)

    def _default_for(self, name: str) -> list[str]:
        """The tasks that a model is the default of."""
        defaults = self.catalog.defaults
        first = [task for task in self._slots.first_for(name) if task not in defaults]
        return [*(task for task, model in defaults.items() if model == name), *first]

    def _report(self, name: str) -> None:
        if self.on_change:
            self.on_change(name)

    def _build(self, entry: ModelEntry) -> Model:
        model = self._assembly.build(entry)
        finish_writes(self.device)
        return model

    def _slot(self, name: str) -> Slot:
        self.catalog.model(name)
        if (slot := self._slots.get(name)) is None:  # removed meanwhile
            raise ModelNotFoundError(f"no model {name!r}")
        return slot

    def _drop_unused_trunks(self, entry: ModelEntry) -> None:
        for trunk in entry.trunks:
            with self._trunk_locks[trunk]:
                if not self._slots.in_use(trunk) and self._trunks.pop(trunk, None) is not None:
                    gc.collect()  # a trunk, its engine and its hooks refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def load_trunk(self, name: str) -> LoadedTrunk:
        """A trunk of the catalog, which is loaded if it is not yet.

        Raises:
            CatalogError: the catalog has no such trunk.
            SourceError, CheckpointError: it cannot be loaded.
        """
        if name not in self.catalog.trunks:
            trunks = ", ".join(self.catalog.trunks)
            raise CatalogError(f"no trunk {name!r} in the catalog; it has {trunks}")
        entry = self.catalog.trunks[name]
        with self._trunk_locks[name]:
            if name not in self._trunks:
                base = self.catalog.path.parent
                loaded = load_trunk(entry, self.store, base, self._placements.placement(entry))
                self._trunks[name] = replace(loaded, source=entry.source)
            return self._trunks[name]
