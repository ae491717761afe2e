"""Vitrail's own format: a converted checkpoint in one safetensors file with metadata.

`models.checkpoints.checkpoint.save_checkpoint` writes it.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import METADATA_KEY, Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.inputs.transforms import preprocess_from_mapping

NAME = "vitrail"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    return f"metadata under {METADATA_KEY}" if METADATA_KEY in container.metadata else None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    metadata = json.loads(container.metadata[METADATA_KEY])
    trunk: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in container.tensors.items():
        kind, rest = key.split(".", 1)
        if kind == "trunk":
            trunk[rest] = value
        else:
            head, name = rest.split(".", 1)
            heads[head][name] = value
    preprocess = metadata["preprocess"]
    settings = metadata.get("heads", {})
    return Checkpoint(
        format=metadata["format"],
        architecture=metadata["architecture"],
        library=metadata.get("library", "timm"),
        arguments=metadata["arguments"],
        state_dict=trunk,
        heads={n: HeadState(heads.get(n, {}), settings.get(n, {})) for n in {**settings, **heads}},
        preprocess=preprocess_from_mapping(preprocess) if preprocess else None,
        labels=tuple(metadata.get("labels", ())),
        reason=metadata["reason"],
    )
