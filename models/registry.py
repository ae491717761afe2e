"""Loaded models by name, the trunks that they share, and the state of each model."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.assembly import Assembly
from models.catalog import Catalog, ModelEntry, TrunkEntry, load_catalog
from models.checkpoints.loading import LoadedTrunk
from models.checkpoints.store import Store
from models.describing import describe
from models.description import ModelDescription, State
from models.errors import CatalogError, ModelNotFoundError, ModelNotReadyError
from models.inputs.transforms import resolve_transform
from models.loaded_trunks import LoadedTrunks
from models.model import Model
from models.placements import Placements
from models.replacement import Replacement
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
        map_weights: bool | None = None,
        on_load: Hook | None = None,
        on_unload: Hook | None = None,
        on_change: Callable[[str], None] | None = None,
    ) -> None:
        self._slots = Slots(catalog.models.values(), self._report)
        self.declared = set(catalog.models)  # of the catalog's files; the other models are heads
        self.catalog = replace(catalog, models=self._slots.entries)  # `add`, `remove` change them
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
            map_weights=map_weights,
            cache=self.store.root / "engines",
        )
        base = catalog.path.parent
        self._placements = Placements(catalog, defaults)
        self._trunks = LoadedTrunks(self._placements, self.store, base, self.device)
        self._assembly = Assembly(base, self.store, self.load_trunk)
        self.on_load = on_load
        self.on_unload = on_unload
        self.on_change = on_change

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
        model = slot.model
        if slot.state is State.READY and model is not None:
            return model
        if self._slots.get(name) is not slot:  # it was replaced or removed meanwhile
            return self.ready(name)
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
                return self.load(name)  # it was replaced or removed meanwhile
            self._slots.set_state(slot, State.LOADING)
            started = time.monotonic()
            try:
                model = self._assembly.build(slot.entry)
                self._warm_up(model)
            except BaseException as error:
                self._slots.set_state(slot, State.FAILED, str(error))
                self._trunks.drop(slot.entry.trunks, self._slots.is_used)
                raise
            slot.load_seconds = time.monotonic() - started
            slot.format = self.load_trunk(slot.entry.trunk).format
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
            self._retire(model)
            del model  # so that its memory can be freed below
        self._trunks.drop(slot.entry.trunks, self._slots.is_used)

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
        self.catalog.trunk(entry.trunk)
        if (old := self._slots.get(entry.name)) and old.model and old.entry.trunk != entry.trunk:
            raise CatalogError(f"{entry.name} uses {old.entry.trunk!r}; remove it first")
        self._replace({}, {entry.name: entry})

    def remove(self, name: str) -> None:
        """Remove a model's declaration, and unload it."""
        slot = self._slot(name)
        with slot.lock:
            model = self._slots.remove(slot)
            self.declared.discard(name)
            self._retire(model)
            del model  # so that its memory can be freed below
        self._trunks.drop(slot.entry.trunks, self._slots.is_used)

    def update(self, trunks: Mapping[str, TrunkEntry], models: Mapping[str, ModelEntry]) -> None:
        """Declare trunks and models of a newer catalog, and replace those that are loaded.

        New versions are built and warmed up while the old ones serve. Then they take over, and the
        old ones answer what they have accepted; until then both are in memory. Heads on a replaced
        trunk are built anew, too; those that do not fit it are `failed` then, as after a restart.

        Args:
            models: also those on these trunks whose own entries are as before.

        Raises:
            ModelsError: a part is invalid or does not load. Everything is as it was.
        """
        for entry in trunks.values():
            self._placements.check(entry)
        if heads := models.keys() & self._slots.entries.keys() - self.declared:
            raise CatalogError(
                f"the catalog has a model {', '.join(sorted(heads))}, which is a head's name, too; "
                "delete the head first"
            )
        self._replace(trunks, models)
        self.declared |= models.keys()

    def remove_trunk(self, name: str) -> None:
        """Remove a trunk's declaration, and the heads on it.

        Raises:
            CatalogError: a model of the catalog uses it.
        """
        users = self._slots.on_trunk(name)
        if used := self.declared.intersection(users):
            raise CatalogError(f"the trunk {name!r} is used by {', '.join(sorted(used))}")
        for head in users:
            self.remove(head)
        trunks = {n: entry for n, entry in self.catalog.trunks.items() if n != name}
        self.catalog = replace(self.catalog, trunks=trunks)

    def set_defaults(self, defaults: Mapping[str, str], startup: Sequence[str]) -> None:
        """Change the models that serve tasks by default, and those that are loaded at start."""
        changed = {*self.catalog.defaults.values(), *defaults.values(), *self._slots.firsts()}
        self.catalog = replace(self.catalog, defaults=defaults, startup=tuple(startup))
        for name in changed & self.catalog.models.keys():
            self._report(name)

    def default_model(self, task: str) -> ModelEntry:
        """The catalog's default model for a task, otherwise the first loaded model that does it.

        Raises:
            ModelNotFoundError: no model does the task.
        """
        if task not in self.catalog.defaults and (first := self._slots.first(task)):
            return first
        return self.catalog.default_model(task)

    def choose_defaults_among(self, may_be: Callable[[ModelEntry], bool]) -> None:
        """Let only some models do the tasks that the catalog has no default for."""
        self._slots.may_be_first = may_be

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
        if (trunk := self.catalog.trunks.get(slot.entry.trunk)) is None:  # removed meanwhile
            raise ModelNotFoundError(f"no model {slot.entry.name!r}")
        name, defaults = slot.entry.name, self.catalog.defaults
        first = [task for task in self._slots.first_for(name) if task not in defaults]
        default_for = [*(task for task, model in defaults.items() if model == name), *first]
        precision = self._placements.precision(trunk)
        return describe(slot, trunk, default_for, str(self.device), precision)

    def _report(self, name: str) -> None:
        if self.on_change:
            self.on_change(name)

    def _slot(self, name: str) -> Slot:
        self.catalog.model(name)
        if (slot := self._slots.get(name)) is None:  # removed meanwhile
            raise ModelNotFoundError(f"no model {name!r}")
        return slot

    def load_trunk(self, name: str) -> LoadedTrunk:
        """A trunk of the catalog, which is loaded if it is not yet.

        Raises:
            CatalogError: the catalog has no such trunk.
            SourceError, CheckpointError: it cannot be loaded.
        """
        return self._trunks.load(self.catalog.trunk(name))

    def _replace(self, trunks: Mapping[str, TrunkEntry], models: Mapping[str, ModelEntry]) -> None:
        def commit() -> None:
            self.catalog = replace(self.catalog, trunks={**self.catalog.trunks, **trunks})

        Replacement(trunks, models, self._slots, self._trunks).run(
            self.catalog.path.parent, self.store, self.load_trunk, self._warm_up, self._retire,
            commit,
        )  # fmt: skip

    def _warm_up(self, model: Model) -> None:
        finish_writes(self.device)
        if self.on_load:
            self.on_load(model)

    def _retire(self, model: Model | None) -> None:
        if self.on_unload and model is not None:
            self.on_unload(model)
