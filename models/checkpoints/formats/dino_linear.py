"""DINO's published linear classifiers (arXiv 2104.14294): weights for the features of a backbone
that is a file of its own.

The features are the class tokens of the last four blocks; or, if the weights take twice the
backbone's channels, the last one's interleaved with the mean of the patch tokens.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.companions import open_companion
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
    """`arguments`: `backbone`, its file, if that is not beside as `backbone.pth`; `num_heads`;
    `n_last_blocks` and `avgpool_patchtokens` where the weights' size does not tell."""
    backbone = open_companion(container, arguments, "backbone", BACKBONES)
    if not backbone.tensors.keys() >= MARKS:
        raise CheckpointError(f"{backbone.path}: not a ViT as DINO publishes it")
    trunk = dict(backbone.tensors)
    weight, bias = container.tensors["linear.weight"], container.tensors["linear.bias"]
    built = vit_arguments(trunk, arguments)
    times = weight.shape[1] / built["embed_dim"]
    mean = bool(arguments.get("avgpool_patchtokens", times == 2))
    blocks = int(arguments.get("n_last_blocks", 1 if mean else times))
    if times != blocks * (1 + mean) or (mean and blocks != 1):
        raise CheckpointError(
            f"linear.weight takes {weight.shape[1]} features; {blocks} blocks of "
            f"{built['embed_dim']} channels{' with means' if mean else ''} are others"
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
        preprocess=Preprocess(input_size=(built["img_size"], built["img_size"])),
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """The features of the classifier, and the plain embedding of the backbone."""
    head: Any = run.heads["classify"]
    return {"embedding": head.features(run.output), "cls_embedding": run.trunk.pool(run.output)}
