"""A checkpoint after translation: what every format converts to, and its one stored form."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from models.inputs.transforms import Preprocess


@dataclass(frozen=True, slots=True)
class HeadState:
    """A head's weights, and what their shapes do not tell."""

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Weights under an architecture's own names.

    Args:
        architecture: a timm name, unless another library builds it.
        library: `timm`; `vitrail`, which is `models/networks`; or a key of `TOWERS` in
            `models/checkpoints/loading.py`.
        arguments: for `timm.create_model`, or for the network of another library.
        heads: weights of heads that came in the same file, by name.
        preprocess: the transform; None: timm's for the architecture.
        dropped: keys that only training needs.
        assumed: values that neither the file nor the arguments state, by the argument's name.
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
    reason: str = ""


METADATA_KEY = "vitrail"


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write one safetensors file that loads without conversion (read by `checkpoints/vitrail.py`).

    Trunk tensors are stored as `trunk.KEY`, those of heads as `head.NAME.KEY`.
    """
    tensors = {f"trunk.{key}": value for key, value in checkpoint.state_dict.items()}
    for name, head in checkpoint.heads.items():
        tensors |= {f"head.{name}.{key}": value for key, value in head.tensors.items()}
    metadata = {
        "format": checkpoint.format,
        "architecture": checkpoint.architecture,
        "library": checkpoint.library,
        "arguments": dict(checkpoint.arguments),
        "preprocess": asdict(checkpoint.preprocess) if checkpoint.preprocess else None,
        "heads": {name: dict(head.settings) for name, head in checkpoint.heads.items()},
        "reason": checkpoint.reason,
    }
    save_file(_apart(tensors), path, metadata={METADATA_KEY: json.dumps(metadata)})


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own: some files hold one under two names."""
    seen: set[int] = set()
    separate = {}
    for key, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        separate[key] = value.clone() if place in seen else value
        seen.add(place)
    return {key: value.contiguous() for key, value in separate.items()}
