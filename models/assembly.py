"""From a catalog's entry and the trunks it names to a model."""

from collections.abc import Callable
from pathlib import Path

from models.catalog import ModelEntry
from models.checkpoints.loading import LoadedTrunk, class_count, own_head
from models.checkpoints.store import Store
from models.errors import CatalogError
from models.heads.dense import DenseClip
from models.heads.embed import Embed
from models.heads.files import read_head
from models.heads.registry import Head, create_head
from models.heads.zero_shot import ZeroShot
from models.inputs.prompts import DEFAULT_TEMPLATES, expand_templates
from models.model import Model
from models.tasks.labels import load_labels, numbered_labels
from models.trunks.base import Trunk
from models.trunks.conse import SCALE, Joined, join_by_classes, load_joined, save_joined
from models.trunks.text import TextTrunk

FILE = "file:"
# What MaskCLIP's code multiplies cosines with, whatever the checkpoint's own scale.
DENSE_SCALE = 100.0


class Assembly:
    """Builds models. `base` is what paths in entries are relative to; `load_trunk` gives a trunk by
    its name, loaded once however many models want it."""

    def __init__(self, base: Path, store: Store, load_trunk: Callable[[str], LoadedTrunk]) -> None:
        self._base = base
        self._store = store
        self._load_trunk = load_trunk

    def build(self, entry: ModelEntry) -> Model:
        """The model of an entry.

        Raises:
            ModelsError: whatever keeps its parts from being had, or from fitting.
        """
        loaded = self._load_trunk(entry.trunk)
        if entry.task == "zero-shot" or entry.head == "dense-clip":
            return self._build_prompted(entry, loaded)
        if entry.head is not None and entry.head.startswith(FILE):
            return self._build_from_file(entry, loaded)
        kind = entry.head or self._kind(entry, loaded)
        state = loaded.heads.get("pca" if kind == "embed" else kind)
        labels = self._labels(entry)
        if not labels and entry.task == "classify":
            count = class_count(loaded.trunk, state)
            labels = (loaded.labels if state is None else ()) or numbered_labels(count)
        head = create_head(kind, loaded.trunk, labels, state)
        if head.task != entry.task:
            raise CatalogError(f"{entry.name}: the head {kind} does {head.task}, not {entry.task}")
        text = self._load_trunk(entry.text).trunk if entry.text else None
        return Model(entry.name, loaded.trunk, head, text=as_text(entry, text), states=loaded.heads)

    def _kind(self, entry: ModelEntry, loaded: LoadedTrunk) -> str:
        """The head for the entry's task: one that the checkpoint brought, or the usual one."""
        brought = own_head(loaded.heads, loaded.trunk)
        if entry.task == "classify" and brought in ("vqt", "linear"):
            return brought
        if entry.task == "segment":
            if brought not in ("saliency", "semantic"):
                raise CatalogError(f"{entry.name}: its checkpoint has no head for segmentation")
            return brought
        return entry.task

    def _build_from_file(self, entry: ModelEntry, loaded: LoadedTrunk) -> Model:
        file = read_head(self._base / str(entry.head).removeprefix(FILE))
        trunk = loaded.trunk
        file.check_trunk(trunk.digest, trunk.preprocess.digest, loaded.source)
        labels = self._labels(entry) or file.labels
        head = create_head(file.kind, trunk, labels, file.state)
        about = {"kind": file.kind, "trunk_digest": file.trunk_digest, "training": file.training}
        return Model(entry.name, trunk, head, about=about)

    def _build_prompted(self, entry: ModelEntry, loaded: LoadedTrunk) -> Model:
        if entry.text is None:
            raise CatalogError(f"{entry.name}: a model prompted by labels needs text = 'TRUNK'")
        text = as_text(entry, self._load_trunk(entry.text).trunk)
        assert text is not None
        labels = self._labels(entry)
        templates = expand_templates(entry.templates or DEFAULT_TEMPLATES)
        text_embed = None
        head: Head
        if entry.head == "dense-clip":
            head = DenseClip(loaded.trunk, DENSE_SCALE, templates, labels)
        elif entry.join == "classes":
            image_map, text_map = self._joined(loaded.trunk, text)
            embed = Embed(loaded.trunk, projection=image_map)
            text_embed = Embed(text, projection=text_map)
            head = ZeroShot(embed, SCALE, None, templates, labels)
        elif loaded.towers is not None:
            towers = loaded.towers
            head = ZeroShot(Embed(loaded.trunk), towers.scale, towers.bias, templates, labels)
        else:
            raise CatalogError(f"{entry.name}: its towers were not trained together; set join")
        return Model(entry.name, loaded.trunk, head, text=text, text_embed=text_embed)

    def _joined(self, image: Trunk, text: TextTrunk) -> Joined:
        """The maps between towers, worked out once and kept in the store."""
        labels = load_labels("imagenet-1k", self._base)
        key = f"joined 2 {image.digest} {text.digest} {text.preprocess.digest}"
        path = self._store.get(
            key,
            ".safetensors",
            lambda target: save_joined(join_by_classes(image, text, labels), target),
        )
        return load_joined(path)

    def _labels(self, entry: ModelEntry) -> tuple[str, ...]:
        return () if entry.labels is None else load_labels(entry.labels, self._base)


def as_text(entry: ModelEntry, trunk: Trunk | None) -> TextTrunk | None:
    """The trunk that a model names as its `text`, which must be one."""
    if trunk is None or isinstance(trunk, TextTrunk):
        return trunk
    raise CatalogError(f"{entry.name}: text = {entry.text!r} is a trunk for images")
