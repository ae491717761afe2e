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
from models.heads.embed import Embed
from models.heads.zero_shot import ZeroShot
from models.joining import SCALE, Joined, join_by_classes, load_joined, save_joined
from models.labels import load_labels, numbered_labels
from models.loading import LoadedTrunk, load_trunk
from models.model import Model
from models.prompts import DEFAULT_TEMPLATES, expand_templates
from models.store import Store
from models.text import TextTrunk
from models.trunk import Placement, Trunk, parameter_bytes

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
                self._drop_unused_trunks(entry)
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
        self._drop_unused_trunks(entry)

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
            "text_trunk": entry.text,
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
                "modalities": ["image"] * model.takes_images + ["text"] * (model.text is not None),
                "load_seconds": round(slot.load_seconds, 3),
            }
        return described

    def _drop_unused_trunks(self, entry: ModelEntry) -> None:
        for trunk in entry.trunks:
            with self._trunk_locks[trunk]:
                if not any(self._uses(name, trunk) for name in self._slots):
                    self._trunks.pop(trunk, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _uses(self, name: str, trunk: str) -> bool:
        slot = self._slots[name]
        in_use = slot.model is not None or slot.state is State.LOADING
        return in_use and trunk in self.catalog.models[name].trunks

    def _build(self, entry: ModelEntry) -> Model:
        loaded = self._trunk(entry.trunk)
        if entry.task == "zero-shot":
            return self._build_zero_shot(entry, loaded)
        name = entry.head or {"segment": "saliency"}.get(entry.task, entry.task)
        labels: tuple[str, ...] = ()
        if entry.labels is not None:
            labels = load_labels(entry.labels, self.catalog.path.parent)
        elif name == "classify":
            labels = loaded.labels or numbered_labels(loaded.trunk.num_classes)
        weights = loaded.heads.get("pca" if name == "embed" else name)
        head = create_head(name, loaded.trunk, labels, weights)
        if head.task != entry.task:
            raise CatalogError(f"{entry.name}: the head {name} does {head.task}, not {entry.task}")
        text = self._trunk(entry.text).trunk if entry.text else None
        return Model(entry.name, loaded.trunk, head, text=as_text(entry, text))

    def _build_zero_shot(self, entry: ModelEntry, loaded: LoadedTrunk) -> Model:
        text = as_text(entry, self._trunk(str(entry.text)).trunk)
        assert text is not None
        labels: tuple[str, ...] = ()
        if entry.labels is not None:
            labels = load_labels(entry.labels, self.catalog.path.parent)
        templates = expand_templates(entry.templates or DEFAULT_TEMPLATES)
        text_embed = None
        if entry.join == "classes":
            image_map, text_map = self._joined(entry, loaded.trunk, text)
            embed = Embed(loaded.trunk, projection=image_map)
            text_embed = Embed(text, projection=text_map)
            head = ZeroShot(embed, SCALE, None, templates, labels)
        elif loaded.towers is not None:
            towers = loaded.towers
            head = ZeroShot(Embed(loaded.trunk), towers.scale, towers.bias, templates, labels)
        else:
            raise CatalogError(f"{entry.name}: its towers were not trained together; set join")
        return Model(entry.name, loaded.trunk, head, text=text, text_embed=text_embed)

    def _joined(self, entry: ModelEntry, image: Trunk, text: TextTrunk) -> Joined:
        """The maps between towers, worked out once and kept in the store."""
        labels = load_labels("imagenet-1k", self.catalog.path.parent)
        key = f"joined 2 {image.digest} {text.digest} {text.preprocess.digest}"
        path = self.store.get(
            key,
            ".safetensors",
            lambda target: save_joined(join_by_classes(image, text, labels), target),
        )
        return load_joined(path)

    def _trunk(self, name: str) -> LoadedTrunk:
        """The trunk, loaded now if it is not yet."""
        entry = self.catalog.trunks[name]
        with self._trunk_locks[name]:
            if name not in self._trunks:
                base = self.catalog.path.parent
                self._trunks[name] = load_trunk(entry, self.store, base, self._placement(entry))
            return self._trunks[name]

    def _placement(self, entry: TrunkEntry) -> Placement:
        return Placement(
            device=self.device,
            dtype=resolve_dtype(entry.dtype or self.dtype),
            channels_last=bool(entry.channels_last),
        )


def as_text(entry: ModelEntry, trunk: Trunk | None) -> TextTrunk | None:
    """The trunk that a model names as its `text`, which must be one."""
    if trunk is None or isinstance(trunk, TextTrunk):
        return trunk
    raise CatalogError(f"{entry.name}: text = {entry.text!r} is a trunk for images")


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
