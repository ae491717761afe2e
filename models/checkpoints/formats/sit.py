"""SiT's pre-training (arXiv 2104.03602, github.com/Sara-Ahmed/SiT).

Student and teacher, each a backbone with a contrastive and a reconstruction head. The teacher is
served; `weights="student"` selects the student.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, gelu, linear

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.vit import (
    PATCHES,
    choose_weights,
    split_prefix,
    vit_checkpoint,
)
from models.checkpoints.strict import check_strictly
from models.reference_outputs import ReferenceRun

NAME = "sit"
HEAD = "head_recons."

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if "head_recons.convTrans.weight" in container.sets.get("teacher", {}):
        return "student and teacher with a head that reconstructs the image"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    weights = choose_weights(container, arguments, "teacher")
    kept, others = split_prefix(weights, "backbone.")
    drawing, _ = split_prefix(weights, HEAD)
    _check_drawing(drawing, *kept[PATCHES].shape[::3])
    return vit_checkpoint(
        NAME,
        kept,
        arguments,
        positions="dino",
        heads={"drawing": HeadState(drawing)},
        dropped=tuple(key for key in others if not key.startswith(HEAD)),
    )


def _check_drawing(tensors: Mapping[str, Tensor], dim: int, patch: int) -> None:
    """Raise CheckpointError unless the head that reconstructs the image is whole, and fits."""
    with torch.device("meta"):
        mlp = nn.Sequential(*(nn.Linear(dim, dim) if i % 2 == 0 else nn.GELU() for i in range(6)))
        cells = nn.ConvTranspose2d(dim, 3, patch, stride=patch)
        network = nn.ModuleDict({"mlp": mlp, "convTrans": cells})
    check_strictly(network, tensors, "the head that reconstructs the image")


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`attention`, the classifier's input `cls_mean_embedding` (B, 2 D), and `reconstruction`
    (B, 3, H, W) of the normalised image."""
    tensors = run.states["drawing"].tensors
    patches = run.output.patches_BTD
    x = patches
    for layer in (0, 2, 4):
        x = gelu(linear(x, tensors[f"mlp.{layer}.weight"], tensors[f"mlp.{layer}.bias"]))
    rows, columns = run.output.grid
    cells = torch.unflatten(x.transpose(1, 2), -1, (rows, columns))
    weight = tensors["convTrans.weight"]
    drawn = conv_transpose2d(cells, weight, tensors["convTrans.bias"], stride=weight.shape[-1])
    return attention_outputs(run) | {
        "cls_mean_embedding": torch.cat([run.output.tokens_BTD[:, 0], patches.mean(1)], -1),
        "reconstruction": drawn,
    }
