"""From trunks and weights to a model: for a catalog's entry, or for a checkpoint file alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.catalog import ModelEntry
from models.checkpoints.checkpoint import HeadState
from models.checkpoints.formats import format_outputs
from models.checkpoints.loading import (
    TOWERS,
    LoadedTrunk,
    build_towers,
    build_trunk,
    read_checkpoint,
)
from models.checkpoints.store import Store
from models.errors import CatalogError
from models.heads.dense import DenseClip
from models.heads.embed import Embed
from models.heads.files import read_head
from models.heads.linear import CLASSIFIER, create_classifier, last_size
from models.heads.portable import create_portable
from models.heads.prompted import Prompted, Similarity
from models.heads.registry import create_head, head_class, head_classes, head_state, main_kind
from models.heads.zero_shot import ZeroShot
from models.inputs.prompts import DEFAULT_TEMPLATES, expand_templates
from models.model import Model
from models.tasks.labels import load_labels, numbered_labels
from models.trunks.base import Trunk
from models.trunks.conse import Joined, join_by_classes, load_joined, save_joined
from models.trunks.devices import Placement
from models.trunks.text import TextTrunk

FILE = "file:"


class Assembly:
    """Builds the models of a catalog."""

    def __init__(self, base: Path, store: Store, load_trunk: Callable[[str], LoadedTrunk]) -> None:
        """
        Args:
            base: the folder that paths in entries are relative to.
            load_trunk: returns a trunk by its name, loaded once for all models on it.
        """
        self._base = base
        self._store = store
        self._load_trunk = load_trunk

    def build(self, entry: ModelEntry) -> Model:
        """The model of an entry.

        Raises:
            ModelsError: a part cannot be loaded, or does not fit the others.
        """
        model = self._build(entry)
        for head in (*model.heads.values(), model.text_embed):
            if isinstance(head, Embed):
                head.trained_dimensions = entry.dimensions
        return model

    def _build(self, entry: ModelEntry) -> Model:
        loaded = self._load_trunk(entry.trunk)
        if entry.head is not None and entry.head.startswith(FILE):
            return self._build_from_file(entry, loaded)
        kind = entry.head or _kind_for_task(entry, loaded)
        head_type = head_class(kind)
        if head_type.task != entry.task:
            raise CatalogError(
                f"{entry.name}: the head {kind} does {head_type.task}, not {entry.task}"
            )
        if issubclass(head_type, Prompted):
            return self._build_prompted(entry, head_type, loaded)
        state = head_state(kind, loaded.heads)
        labels = self._labels(entry)
        if not labels and entry.task == "classify":
            count = class_count(loaded.trunk, state)
            labels = loaded.labels if len(loaded.labels) == count else numbered_labels(count)
        head = create_head(kind, loaded.trunk, labels, state)
        text = self._text(entry)
        return Model(entry.name, loaded.trunk, head, text=text, states=loaded.heads)

    def _build_from_file(self, entry: ModelEntry, loaded: LoadedTrunk) -> Model:
        file = read_head(self._base / str(entry.head).removeprefix(FILE))
        trunk = loaded.trunk
        file.check_trunk(trunk.digest, trunk.preprocess.digest, loaded.source)
        labels = self._labels(entry) or file.labels
        head, adapter = create_portable(file, trunk, labels)
        about = {"kind": file.kind, "trunk_digest": file.trunk_digest, "training": file.training}
        return Model(entry.name, trunk, head, about=about, adapter=adapter)

    def _build_prompted(
        self, entry: ModelEntry, head_type: type[Prompted], loaded: LoadedTrunk
    ) -> Model:
        text = self._text(entry)
        if text is None:
            raise CatalogError(f"{entry.name}: a model prompted by labels needs text = 'TRUNK'")
        towers = loaded.towers
        try:
            head = head_type.create_prompted(
                loaded.trunk,
                text,
                None if towers is None else Similarity(towers.scale, towers.bias),
                join=self._joined(loaded.trunk, text) if entry.join == "classes" else None,
                templates=expand_templates(entry.templates or DEFAULT_TEMPLATES),
                labels=self._labels(entry),
            )
        except CatalogError as error:
            raise CatalogError(f"{entry.name}: {error}") from error
        return Model(entry.name, loaded.trunk, head, text=text)

    def _joined(self, image: Trunk, text: TextTrunk) -> Joined:
        """The projections of towers that were not trained together, computed once and stored."""
        labels = load_labels("imagenet-1k", self._base)
        key = f"joined 2 {image.digest} {text.digest} {text.preprocess.digest}"
        path = self._store.get(
            key,
            ".safetensors",
            lambda target: save_joined(join_by_classes(image, text, labels), target),
        )
        return load_joined(path)

    def _text(self, entry: ModelEntry) -> TextTrunk | None:
        """The trunk that an entry names as its `text`."""
        if entry.text is None:
            return None
        trunk = self._load_trunk(entry.text).trunk
        if isinstance(trunk, TextTrunk):
            return trunk
        raise CatalogError(f"{entry.name}: text = {entry.text!r} is a trunk for images")

    def _labels(self, entry: ModelEntry) -> tuple[str, ...]:
        return () if entry.labels is None else load_labels(entry.labels, self._base)


def load_checkpoint(
    path: str | Path,
    arguments: Mapping[str, Any] | None = None,
    *,
    placement: Placement | None = None,
    **more: Any,
) -> Model:
    """Load a checkpoint file as a model, without a catalog.

    Args:
        path: `.safetensors`, `.npz`, `.onnx`, a torch file or an index of shards, in any supported
            format.
        arguments: what the file does not say, such as `num_heads` or `architecture`. Names that
            the file does not need are ignored.
        placement: device, dtype and layout; None: float32 on the CPU.
        more: further arguments: `weights="student"` among several sets in one file,
            `backbone=PATH` of a companion file that is not beside it.

    Raises:
        CheckpointError: unreadable, of no supported format, or not fitting its architecture.
    """
    checkpoint = read_checkpoint(Path(path), {**(arguments or {}), **more})
    name, placement = Path(path).stem, placement or Placement()
    states = checkpoint.heads
    if checkpoint.library in TOWERS:
        towers = build_towers(checkpoint, placement)
        outputs, request = format_outputs(checkpoint.format, towers.image)
        dense = head_state(DenseClip.kind, states)
        head_type: type[Prompted] = ZeroShot if dense is None else DenseClip
        prompted = head_type.create_prompted(
            towers.image,
            towers.text,
            Similarity(towers.scale, towers.bias),
            state=dense,
            templates=expand_templates(DEFAULT_TEMPLATES),
        )
        return Model(
            name, towers.image, prompted, text=towers.text,
            format_outputs=outputs, format_request=request,
        )  # fmt: skip
    trunk = build_trunk(checkpoint, placement)
    kind = main_kind(trunk, states)
    state = head_state(kind, states)
    # other heads' files name their own classes
    has_count = head_class(kind).task == "classify"
    labels: Sequence[str] = ()
    if has_count:
        count = class_count(trunk, state)
        labels = checkpoint.labels if len(checkpoint.labels) == count else numbered_labels(count)
    head = create_head(kind, trunk, labels, state)
    outputs, request = format_outputs(checkpoint.format, trunk)
    return Model(name, trunk, head, format_outputs=outputs, format_request=request, states=states)


def class_count(trunk: Trunk, state: HeadState | None) -> int:
    """Classes of a head's own classifier, or else of the trunk's."""
    if state is None or not any(key.startswith(CLASSIFIER) for key in state.tensors):
        return trunk.num_classes
    return last_size(create_classifier(state))


def _kind_for_task(entry: ModelEntry, loaded: LoadedTrunk) -> str:
    """The head for an entry's task: the one whose weights came with the checkpoint, or the one
    that needs none.

    Raises:
        CatalogError: there is none.
    """
    kind = main_kind(loaded.trunk, loaded.heads)
    if head_class(kind).task == entry.task:
        return kind
    usable = [
        kind
        for kind, head in head_classes().items()
        if head.task == entry.task
        and not (head.needs_state and head_state(kind, loaded.heads) is None)
    ]
    if entry.task in usable:
        return entry.task
    if len(usable) == 1:
        return usable[0]
    heads = ", ".join(f"head = {kind!r}" for kind in usable)
    remedy = f"; set {heads}" if usable else ""
    raise CatalogError(f"{entry.name}: its checkpoint has no head for {entry.task}{remedy}")
