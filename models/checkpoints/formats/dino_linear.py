"""DINO's published linear classifiers (arXiv 2104.14294, github.com/facebookresearch/dino).

The file holds the classifier alone; the backbone is a companion file. Its input are the class
tokens of the last four blocks or, if it takes twice the backbone's channels, the last class token
interleaved with the mean of the patch tokens.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.companions import open_companion
from models.checkpoints.families.heads import assumed
from models.checkpoints.families.vit import MARKS, vit_arguments
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.reference_outputs import ReferenceRun

NAME = "dino-linear"
BACKBONES = ("backbone.pth", "backbone.safetensors")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if container.tensors.keys() == {"linear.weight", "linear.bias"}:
        return "nothing but linear.weight and linear.bias"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `backbone`, a path (`backbone.pth` beside the file); `num_heads` (as published);
    `n_last_blocks` and `avgpool_patchtokens` (from the number of features).

    Raises:
        CheckpointError: the backbone is not a ViT, or has another number of features.
    """
    backbone = open_companion(container, arguments, "backbone", BACKBONES)
    if not backbone.tensors.keys() >= MARKS:
        raise CheckpointError(f"{backbone.path}: not a ViT in timm's names, as DINO publishes it")
    trunk = dict(backbone.tensors)
    weight, bias = container.tensors["linear.weight"], container.tensors["linear.bias"]
    built = vit_arguments(trunk, arguments)
    times = weight.shape[1] / built["embed_dim"]
    mean = bool(arguments.get("avgpool_patchtokens", times == 2))
    blocks = int(arguments.get("n_last_blocks", 1 if mean else times))
    if times != blocks * (1 + mean) or (mean and blocks != 1):
        raise CheckpointError(
            f"linear.weight takes {weight.shape[1]} features, which is not what {blocks} blocks of "
            f"{built['embed_dim']} channels{' with the mean patch' if mean else ''} return; set "
            "n_last_blocks and avgpool_patchtokens"
        )
    head = HeadState(
        {"classifier.0.weight": weight, "classifier.0.bias": bias},
        {"layers": list(range(-blocks, 0)), "mean": "interleaved" if mean else None},
    )
    return Checkpoint(
        format=NAME,
        architecture="vit_small_patch16_224",
        arguments=built | {"num_classes": 0},
        state_dict=trunk,
        heads={"linear": head},
        assumed=assumed(
            arguments,
            num_heads=built["num_heads"],
            n_last_blocks=blocks,
            avgpool_patchtokens=mean,
        ),
        preprocess=Preprocess(input_size=(built["img_size"], built["img_size"])),
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`embedding`, the classifier's input, and `cls_embedding`, the backbone's pooled output."""
    head: Any = run.heads["classify"]
    return {"embedding": head.features(run.output), "cls_embedding": run.trunk.pool(run.output)}
