"""ResMLP (arXiv 2105.03404, github.com/facebookresearch/deit): a flat state dict.

The input size is that of the first layer over tokens.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.ratios import mlp_ratio
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

NAME = "resmlp"
MARKS = {"blocks.0.norm1.alpha", "blocks.0.attn.weight", "patch_embed.proj.weight"}
RENAMED = (
    ("patch_embed.", "stem."),
    (".attn.", ".linear_tokens."),
    (".mlp.", ".mlp_channels."),
    (".gamma_", ".ls"),
)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if container.tensors.keys() >= MARKS:
        return "blocks with a linear layer over tokens, and norm1.alpha"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """Everything is in the shapes.

    Raises:
        CheckpointError: the tokens are not those of a square grid.
    """
    tensors = container.tensors
    dim, _, _, patch = tensors["patch_embed.proj.weight"].shape
    cells = len(tensors["blocks.0.attn.weight"])
    side = math.isqrt(cells)
    if side**2 != cells:
        raise CheckpointError(f"blocks.0.attn.weight is for {cells} tokens, not a square grid")
    head = tensors.get("head.weight")
    size = (side * patch, side * patch)
    return Checkpoint(
        format=NAME,
        architecture="resmlp",
        library=OWN,
        arguments={
            "img_size": size,
            "patch_size": patch,
            "embed_dim": dim,
            "num_blocks": len({k.split(".")[1] for k in tensors if k.startswith("blocks.")}),
            "mlp_ratio": mlp_ratio(len(tensors["blocks.0.mlp.fc1.weight"]), dim),
            "num_classes": 0 if head is None else len(head),
        },
        state_dict=dict(_in_timms_names(key, value) for key, value in tensors.items()),
        preprocess=Preprocess(input_size=size, crop_pct=0.9),
    )


def _in_timms_names(key: str, value: Tensor) -> tuple[str, Tensor]:
    for theirs, ours in RENAMED:
        key = key.replace(theirs, ours)
    return key, value[None, None] if key.endswith((".alpha", ".beta")) else value
