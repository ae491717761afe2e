"""Loaded models by name, the trunks that they share, and the state of each model."""

import gc
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from models.assembly import Assembly
from models.catalog import Catalog, ModelEntry, load_catalog
from models.checkpoints.loading import LoadedTrunk, load_trunk
from models.checkpoints.store import Store
from models.description import ModelDescription, State
from models.errors import CatalogError, ModelNotFoundError, ModelNotReadyError
from models.inputs.transforms import resolve_transform
from models.model import Model
from models.placements import Placements
from models.slot import Slot
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
        # `add` and `remove` change this dictionary, which the catalog refers to.
        self._models = dict(catalog.models)
        self.catalog = replace(catalog, models=self._models)
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
        self._positions = count()
        self._slots = {
            name: Slot(entry, next(self._positions)) for name, entry in catalog.models.items()
        }
        # Protects the three below.
        self._lock = threading.Lock()
        self._states = Counter(slot.state for slot in self._slots.values())
        # For each task the first loaded model that does it, in the catalog's order.
        self._first: dict[str, Slot] = {}
        # For each trunk the models that are loaded or loading.
        self._users: defaultdict[str, set[str]] = defaultdict(set)
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
            self._set_state(slot, State.LOADING)
            started = time.monotonic()
            try:
                model = self._build(slot.entry)
                if self.on_load:
                    self.on_load(model)
            except BaseException as error:
                self._set_state(slot, State.FAILED, str(error))
                self._drop_unused_trunks(slot.entry)
                raise
            slot.load_seconds = time.monotonic() - started
            slot.format = self._trunks[slot.entry.trunk].format
            slot.model = model
            self._set_state(slot, State.READY)
            logger.info("model %s loaded in %.1f s", name, slot.load_seconds)
            return model

    def unload(self, name: str) -> None:
        """Unload a model, and its trunks if no other model uses them."""
        slot = self._slot(name)
        with slot.lock:
            model, slot.model = slot.model, None
            self._set_state(slot, State.UNLOADED)
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
        old = self._slots.get(entry.name)
        position = next(self._positions) if old is None else old.position
        slot = Slot(entry, position)
        if old is not None and old.model is not None:
            if old.entry.trunk != entry.trunk:
                raise CatalogError(f"{entry.name} uses {old.entry.trunk!r}; remove it first")
            slot.model = self._build(entry)
            slot.format, slot.load_seconds = old.format, old.load_seconds
        with self._lock:
            if old is not None:
                self._states[old.state] -= 1
            self._states[slot.state] += 1
        self._slots[entry.name] = slot
        self._models[entry.name] = entry
        self._set_state(slot, State.UNLOADED if slot.model is None else State.READY)

    def remove(self, name: str) -> None:
        """Unload a model, and remove its declaration."""
        self.unload(name)
        if (slot := self._slots.pop(name, None)) is not None:
            with self._lock:
                self._states[slot.state] -= 1
        self._models.pop(name, None)
        self._changed(name)

    def default_model(self, task: str) -> ModelEntry:
        """The catalog's default model for a task, otherwise the first loaded model that does it.

        Raises:
            ModelNotFoundError: no model does the task.
        """
        first = self._first.get(task)
        if task not in self.catalog.defaults and first is not None:
            return first.entry
        return self.catalog.default_model(task)

    def names(self, start: int = 0, count: int | None = None) -> list[str]:
        """Names of models, in the catalog's order: `count` from place `start` on, or all."""
        return list(islice(self._slots, start, None if count is None else start + count))

    def states(self) -> Mapping[State, int]:
        """The number of models in each state."""
        with self._lock:
            return Counter(self._states)

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
        return {name: self._describe(slot) for name, slot in list(self._slots.items())}

    def _describe(self, slot: Slot) -> ModelDescription:
        entry, trunk_entry = slot.entry, self.catalog.trunks[slot.entry.trunk]
        description = ModelDescription(
            name=entry.name,
            task=entry.task,
            tasks=tuple(dict.fromkeys((entry.task, "embed"))),
            default_for=self._default_for(entry.name),
            trunk=entry.trunk,
            text_trunk=entry.text,
            state=str(slot.state),
            reason=slot.reason or None,
            source=trunk_entry.source,
            device=str(self.device),
            dtype=self._placements.precision(trunk_entry),
            licence=entry.licence,
            description=entry.description,
        )
        if (model := slot.model) is None:
            return description
        trunk = model.trunk
        engine, report = trunk.engine, trunk.engine.report()
        return replace(
            description,
            tasks=tuple(model.tasks),
            format=slot.format,
            architecture=trunk.architecture,
            engine=report.name,
            precision=trunk.placement.precision,
            transform=getattr(trunk.preprocess, "transform", "exact"),
            agreement=report.to_json(),
            engine_reason=report.reason or None,
            memory_bytes=model.trunk_bytes + model.head_bytes + engine.nbytes,
            head_bytes=model.head_bytes,
            head=dict(model.about) or None,
            preprocess=asdict(trunk.preprocess),
            labels=len(getattr(model.heads[model.task], "labels", ())),
            model_digest=model.digest,
            preprocess_digest=trunk.preprocess.digest,
            modalities=tuple(model.modalities),
            load_seconds=round(slot.load_seconds, 3),
        )

    def _default_for(self, name: str) -> tuple[str, ...]:
        """The tasks that a model is the default of."""
        defaults = self.catalog.defaults
        first = [task for task, slot in list(self._first.items()) if slot.entry.name == name]
        return (
            *(task for task, model in defaults.items() if model == name),
            *(task for task in first if task not in defaults),
        )

    def _set_state(self, slot: Slot, state: State, reason: str = "") -> None:
        """Note a slot's state, and what follows from it for trunks and for tasks' defaults."""
        name, in_use = slot.entry.name, slot.model is not None or state is State.LOADING
        changed = {name}
        with self._lock:
            self._states[slot.state] -= 1
            self._states[state] += 1
            slot.state, slot.reason = state, reason
            for trunk in slot.entry.trunks:
                (self._users[trunk].add if in_use else self._users[trunk].discard)(name)
            changed |= self._update_first(slot)
        for name in changed:
            self._changed(name)

    def _update_first(self, slot: Slot) -> set[str]:
        """Update the tasks' first models. Returns the names of the models that were replaced."""
        replaced = set()
        does = () if slot.model is None else slot.model.heads
        for task in does:
            first = self._first.get(task)
            if first is None or slot.position <= first.position:
                self._first[task] = slot
                replaced |= {first.entry.name} if first is not None else set()
        own = [t for t, first in self._first.items() if first.entry.name == slot.entry.name]
        for task in own:
            if task in does:
                continue
            del self._first[task]
            slots = list(self._slots.values())
            if (other := next((each for each in slots if each.does(task)), None)) is not None:
                self._first[task] = other
                replaced.add(other.entry.name)
        return replaced

    def _changed(self, name: str) -> None:
        if self.on_change:
            self.on_change(name)

    def _build(self, entry: ModelEntry) -> Model:
        model = self._assembly.build(entry)
        finish_writes(self.device)
        return model

    def _slot(self, name: str) -> Slot:
        entry = self.catalog.model(name)
        try:
            return self._slots[entry.name]
        except KeyError as error:  # removed meanwhile
            raise ModelNotFoundError(f"no model {name!r}") from error

    def _drop_unused_trunks(self, entry: ModelEntry) -> None:
        for trunk in entry.trunks:
            with self._trunk_locks[trunk]:
                if not self._users[trunk] and self._trunks.pop(trunk, None) is not None:
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
