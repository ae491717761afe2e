"""Loaded models by name, the trunks that they share, and the state of each model."""

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
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
    ) -> None:
        self.catalog = catalog
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
        self._slots = {name: Slot(entry) for name, entry in catalog.models.items()}
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
            slot.state, slot.reason = State.LOADING, ""
            started = time.monotonic()
            try:
                model = self._build(slot.entry)
                if self.on_load:
                    self.on_load(model)
            except BaseException as error:
                slot.state, slot.reason = State.FAILED, str(error)
                self._drop_unused_trunks(slot.entry)
                raise
            slot.load_seconds = time.monotonic() - started
            slot.format = self._trunks[slot.entry.trunk].format
            slot.model, slot.state = model, State.READY
            logger.info("model %s loaded in %.1f s", name, slot.load_seconds)
            return model

    def unload(self, name: str) -> None:
        """Unload a model, and its trunks if no other model uses them."""
        slot = self._slot(name)
        with slot.lock:
            model, slot.model = slot.model, None
            slot.state, slot.reason = State.UNLOADED, ""
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
        self._slots[entry.name] = slot
        self.catalog = replace(self.catalog, models={**self.catalog.models, entry.name: entry})

    def remove(self, name: str) -> None:
        """Unload a model, and remove its declaration."""
        self.unload(name)
        self._slots.pop(name, None)
        models = {other: entry for other, entry in self.catalog.models.items() if other != name}
        self.catalog = replace(self.catalog, models=models)

    def default_model(self, task: str) -> ModelEntry:
        """The catalog's default model for a task, otherwise the first loaded model that does it.

        Raises:
            ModelNotFoundError: no model does the task.
        """
        if task not in self.catalog.defaults:
            for name, slot in list(self._slots.items()):
                if slot.model is not None and task in slot.model.heads:
                    return self.catalog.models[name]
        return self.catalog.default_model(task)

    def state(self, name: str) -> State:
        """The state of a model that is in the catalog."""
        return self._slot(name).state

    def describe(self, name: str) -> ModelDescription:
        """A model's description: from the catalog, and from the weights once they are loaded.

        Raises:
            ModelNotFoundError: not in the catalog.
        """
        return self._describe(self._slot(name), self._defaults().get(name, ()))

    def describe_all(self) -> dict[str, ModelDescription]:
        """Every model's description by name, in the catalog's order."""
        defaults = self._defaults()
        return {
            name: self._describe(slot, defaults.get(name, ()))
            for name, slot in list(self._slots.items())
        }

    def _describe(self, slot: Slot, default_for: Sequence[str]) -> ModelDescription:
        entry, trunk_entry = slot.entry, self.catalog.trunks[slot.entry.trunk]
        description = ModelDescription(
            name=entry.name,
            task=entry.task,
            tasks=tuple(dict.fromkeys((entry.task, "embed"))),
            default_for=tuple(default_for),
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

    def _defaults(self) -> dict[str, list[str]]:
        """The tasks that each model is the default of, computed in one pass over all models."""
        names = dict(self.catalog.defaults)
        for name, slot in list(self._slots.items()):
            if (model := slot.model) is not None:
                for task in model.heads:
                    names.setdefault(task, name)
        defaults: dict[str, list[str]] = {}
        for task, name in names.items():
            defaults.setdefault(name, []).append(task)
        return defaults

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
                unused = not any(slot.uses(trunk) for slot in list(self._slots.values()))
                if unused and self._trunks.pop(trunk, None) is not None:
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
