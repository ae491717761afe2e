"""A translated checkpoint, which every format converts to, and its stored form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from models.inputs.transforms import Preprocess


@dataclass(frozen=True, slots=True)
class HeadState:
    """A head's weights.

    Args:
        tensors: the weights by name.
        settings: what the shapes do not determine, as plain values.
    """

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights under an architecture's own parameter names.

    Args:
        format: `NAME` of the format that the file was read by.
        architecture: the network's name in `library`.
        library: what builds the network: `timm` (by `timm.create_model`), `vitrail`
            (`models/networks`), or a key of `TOWERS` in `models/checkpoints/loading.py`.
        arguments: keyword arguments of the network.
        state_dict: the network's weights, complete.
        heads: the states of heads in the same file, by name.
        preprocess: how the network expects its images; None for the library's default.
        dropped: keys of the file that only training uses.
        assumed: values that neither the file nor the caller gave, by argument.
        labels: class names of its classifier, if the file or one beside it has them.
        reason: how the format was recognised.
    """

    format: str
    architecture: str
    library: str = "timm"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    state_dict: Mapping[str, Tensor]
    heads: Mapping[str, HeadState] = field(default_factory=dict)
    preprocess: Preprocess | None = None
    dropped: tuple[str, ...] = ()
    assumed: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    reason: str = ""


METADATA_KEY = "vitrail"


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write one safetensors file that loads without conversion (see `formats/vitrail.py`).

    Trunk tensors are stored as `trunk.KEY`, those of heads as `head.NAME.KEY`.
    """
    tensors = {f"trunk.{key}": value for key, value in checkpoint.state_dict.items()}
    for name, head in checkpoint.heads.items():
        tensors |= {f"head.{name}.{key}": value for key, value in head.tensors.items()}
    metadata: dict[str, Any] = {
        "format": checkpoint.format,
        "architecture": checkpoint.architecture,
        "library": checkpoint.library,
        "arguments": dict(checkpoint.arguments),
        "preprocess": checkpoint.preprocess.settings if checkpoint.preprocess else None,
        "heads": {name: dict(head.settings) for name, head in checkpoint.heads.items()},
        "reason": checkpoint.reason,
    }
    if checkpoint.labels:
        metadata["labels"] = checkpoint.labels
    save_file(_unshared(tensors), path, metadata={METADATA_KEY: json.dumps(metadata)})


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, none of which share memory, as safetensors requires."""
    addresses: set[int] = set()
    unshared = {}
    for key, value in tensors.items():
        address = value.untyped_storage().data_ptr()
        unshared[key] = value.clone() if address in addresses else value
        addresses.add(address)
    return {key: value.contiguous() for key, value in unshared.items()}
