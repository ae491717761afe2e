"""MoCo v3's linear classifiers (arXiv 2104.02057): the whole ViT with its `head`, in timm's names,
saved by a training script that notes `arch` and `best_acc1` beside it.

Both published sizes have 12 heads, whatever their channels.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoint import Checkpoint
from models.containers import Container
from models.model import Model
from models.need import Need
from models.preprocess import Preprocess
from models.trunk import Trunk, TrunkOutput
from models.vit_keys import MARKS, vit_arguments

NAME = "moco-v3-linear"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    notes = {"arch", "best_acc1"} <= container.beside.keys()
    whole = container.tensors.keys() >= MARKS | {"head.weight"}
    if notes and whole and "architecture" not in arguments:
        return "a ViT in timm's names with its head, and arch and best_acc1 beside it"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    built = vit_arguments(container.tensors, {"num_heads": 12, **arguments})
    return Checkpoint(
        format=NAME,
        architecture="vit_small_patch16_224",
        arguments=built,
        state_dict=dict(container.tensors),
        preprocess=Preprocess(
            input_size=(built["img_size"], built["img_size"]), interpolation="bilinear"
        ),
    )


def need(trunk: Trunk) -> Need:
    """The attention of the last block."""
    return Need(attention=frozenset({len(trunk.blocks) - 1}))


def outputs(model: Model, output: TrunkOutput) -> dict[str, Tensor]:
    [attention] = output.attention.values()
    return {"attention": attention}
