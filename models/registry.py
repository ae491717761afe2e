"""What is loaded now: models by name, trunks shared between them, each with a truthful state."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from models.catalog import Catalog, ModelEntry, TrunkEntry, load_catalog
from models.errors import CatalogError, ModelNotReadyError
from models.heads import create_head
from models.labels import load_labels, numbered_labels
from models.loading import LoadedTrunk, load_trunk
from models.model import Model
from models.store import Store
from models.trunk import Placement, parameter_bytes

logger = logging.getLogger(__name__)


class State(StrEnum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(slots=True)
class _Slot:
    state: State = State.UNLOADED
    reason: str = ""
    model: Model | None = None
    format: str = ""
    load_seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)


Hook = Callable[[Model], None]


class Registry:
    """Loads and unloads a catalog's models. Every method may be called from any thread.

    `on_load` runs after a model is built and before it is ready (a server warms it up there);
    `on_unload` runs after it has stopped being ready and before its memory is let go.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        store: Store | None = None,
        device: str = "auto",
        dtype: str = "float32",
        on_load: Hook | None = None,
        on_unload: Hook | None = None,
    ) -> None:
        self.catalog = catalog
        self.store = store or Store()
        self.device = resolve_device(device)
        self.dtype = dtype
        self.on_load = on_load
        self.on_unload = on_unload
        self._slots = {name: _Slot() for name in catalog.models}
        self._trunks: dict[str, LoadedTrunk] = {}
        self._trunk_locks = {name: threading.Lock() for name in catalog.trunks}

    @classmethod
    def from_catalog(cls, name_or_path: str | Path, **options: Any) -> "Registry":
        """A registry over a built-in catalog's name or a TOML file's path."""
        return cls(load_catalog(name_or_path), **options)

    def get(self, name: str) -> Model:
        """The model, loaded now if it is not yet."""
        return self.load(name)

    def ready(self, name: str) -> Model:
        """The model if it is ready.

        Raises:
            ModelNotFoundError: not in the catalog.
            ModelNotReadyError: in the catalog, but not ready.
        """
        entry = self.catalog.model(name)
        slot = self._slots[entry.name]
        if slot.state is State.READY and slot.model is not None:
            return slot.model
        reason = f": {slot.reason}" if slot.reason else ""
        raise ModelNotReadyError(f"model {name!r} is {slot.state}{reason}", state=slot.state)

    def load(self, name: str) -> Model:
        """Load a model, waiting if another thread is at it; a loaded one is returned at once.

        Raises:
            ModelsError: whatever kept it from loading; its state is then `failed`, with the reason.
        """
        entry = self.catalog.model(name)
        slot = self._slots[name]
        with slot.lock:
            if slot.model is not None:
                return slot.model
            slot.state, slot.reason = State.LOADING, ""
            started = time.monotonic()
            try:
                model = self._build(entry)
                if self.on_load:
                    self.on_load(model)
            except BaseException as error:
                slot.state, slot.reason = State.FAILED, str(error)
                self._drop_unused_trunk(entry.trunk)
                raise
            slot.load_seconds = time.monotonic() - started
            slot.format = self._trunks[entry.trunk].format
            slot.model, slot.state = model, State.READY
            logger.info("model %s loaded in %.1f s", name, slot.load_seconds)
            return model

    def unload(self, name: str) -> None:
        """Let a model go, and its trunk with the last model on it."""
        entry = self.catalog.model(name)
        slot = self._slots[name]
        with slot.lock:
            model, slot.model = slot.model, None
            slot.state, slot.reason = State.UNLOADED, ""
            if model is not None and self.on_unload:
                self.on_unload(model)
        self._drop_unused_trunk(entry.trunk)

    def state(self, name: str) -> State:
        """The state of a model that is in the catalog."""
        return self._slots[self.catalog.model(name).name].state

    def describe(self, name: str) -> dict[str, Any]:
        """What `GET /models/{name}` tells: from the catalog, and from the weights once loaded."""
        entry = self.catalog.model(name)
        trunk_entry = self.catalog.trunks[entry.trunk]
        slot = self._slots[name]
        described: dict[str, Any] = {
            "name": name,
            "task": entry.task,
            "tasks": list(dict.fromkeys((entry.task, "embed"))),
            "default_for": [task for task, best in self.catalog.defaults.items() if best == name],
            "trunk": entry.trunk,
            "state": str(slot.state),
            "reason": slot.reason or None,
            "source": trunk_entry.source,
            "device": str(self.device),
            "dtype": trunk_entry.dtype or self.dtype,
            "licence": entry.licence,
            "description": entry.description,
        }
        if (model := slot.model) is not None:
            trunk = model.trunk
            labels = getattr(model.heads[model.task], "labels", ())
            described |= {
                "format": slot.format,
                "architecture": trunk.architecture,
                "memory_bytes": parameter_bytes(trunk.network) + model.head_bytes,
                "preprocess": asdict(trunk.preprocess),
                "labels": len(labels),
                "model_digest": model.digest,
                "preprocess_digest": trunk.preprocess.digest,
                "load_seconds": round(slot.load_seconds, 3),
            }
        return described

    def _drop_unused_trunk(self, trunk: str) -> None:
        with self._trunk_locks[trunk]:
            if not any(self._uses(name, trunk) for name in self._slots):
                self._trunks.pop(trunk, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _uses(self, name: str, trunk: str) -> bool:
        slot = self._slots[name]
        in_use = slot.model is not None or slot.state is State.LOADING
        return in_use and self.catalog.models[name].trunk == trunk

    def _build(self, entry: ModelEntry) -> Model:
        trunk_entry = self.catalog.trunks[entry.trunk]
        with self._trunk_locks[entry.trunk]:
            if entry.trunk not in self._trunks:
                placement = self._placement(trunk_entry)
                base = self.catalog.path.parent
                loaded = load_trunk(trunk_entry, self.store, base, placement)
                self._trunks[entry.trunk] = loaded
            loaded = self._trunks[entry.trunk]
        name = entry.head or {"segment": "saliency"}.get(entry.task, entry.task)
        labels: tuple[str, ...] = ()
        if entry.labels is not None:
            labels = load_labels(entry.labels, self.catalog.path.parent)
        elif name == "classify":
            labels = loaded.labels or numbered_labels(loaded.trunk.num_classes)
        head = create_head(name, loaded.trunk, labels, loaded.heads.get(name))
        if head.task != entry.task:
            raise CatalogError(f"{entry.name}: the head {name} does {head.task}, not {entry.task}")
        return Model(entry.name, loaded.trunk, head)

    def _placement(self, entry: TrunkEntry) -> Placement:
        return Placement(
            device=self.device,
            dtype=resolve_dtype(entry.dtype or self.dtype),
            channels_last=bool(entry.channels_last),
        )


def resolve_device(device: str) -> torch.device:
    """`auto` is the first GPU if there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise CatalogError(f"no device {device!r}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise CatalogError(f"device {device!r} was asked for, but torch sees no GPU")
    return resolved


def resolve_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` as torch's type."""
    dtypes = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in dtypes:
        raise CatalogError(f"no dtype {name!r}; there are {', '.join(dtypes)}")
    return dtypes[name]
