"""A ViT with group generalized mean pooling (GGeM, arXiv 2212.04114).

timm's names, and the exponents of the G groups as `ggem.p` (G,). No checkpoint is published; that
name is chosen here.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.heads import assumed
from models.checkpoints.families.vit import MARKS, vit_arguments
from models.inputs.transforms import Preprocess
from models.reference_outputs import ReferenceRun
from models.trunks.pooling import gem, ggem

NAME = "ggem"
EXPONENTS = "ggem.p"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if EXPONENTS in container.tensors and container.tensors.keys() >= MARKS:
        return "a ViT in timm's names with pooling exponents ggem.p"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `num_heads` (the number of groups, of a single group as published)."""
    tensors = dict(container.tensors)
    exponents = tensors.pop(EXPONENTS)
    groups = {"num_heads": len(exponents)} if len(exponents) > 1 else {}
    built = vit_arguments(tensors, {**groups, **arguments})
    return Checkpoint(
        format=NAME,
        architecture="vit_small_patch16_224",
        arguments=built,
        state_dict=tensors,
        assumed=assumed(arguments, num_heads=built["num_heads"]),
        preprocess=Preprocess(input_size=(built["img_size"], built["img_size"])),
        heads={"ggem": HeadState({"p": exponents})},
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """Every pooling that the paper compares, and GGeM over all tokens with the class token."""
    exponents = run.trunk.exponents
    assert exponents is not None
    patches = run.output.patches_BTD
    return {
        "pool_ggem": ggem(patches, exponents),
        "pool_ggem_with_cls": ggem(run.output.tokens_BTD, exponents),
        "pool_gem_p3": gem(patches),
        "pool_max": patches.amax(1),
        "pool_mean": patches.mean(1),
        "pool_cls": run.output.tokens_BTD[:, 0],
        "ggem_p": exponents,
    }
