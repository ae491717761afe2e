"""DINOv2's linear classifiers (arXiv 2304.07193, github.com/facebookresearch/dinov2).

The published file has `weight` and `bias` alone; the backbone is a companion file. The hub's whole
classifier has both, under `linear_head` and `backbone`; the evaluation script's file has many
classifiers, whose names say what they read. The features are the class tokens of the last one or
four blocks, and the mean of the last block's patch tokens.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.dinov2 import dinov2_checkpoint, is_dinov2, open_backbone
from models.checkpoints.families.vit import split_prefix
from models.errors import CheckpointError
from models.reference_outputs import ReferenceRun

NAME = "dinov2-linear"
PUBLISHED = {"weight", "bias"}
SCRIPT = re.compile(r"^classifiers_dict\.(classifier_\d+_blocks_avgpool_\w+)\.linear\.(\w+)$")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    tensors = container.tensors
    if tensors.keys() == PUBLISHED and tensors["weight"].dim() == 2:
        return "nothing but weight and bias"
    if "linear_head.weight" in tensors and is_dinov2(split_prefix(tensors, "backbone.")[0]):
        return "a linear_head, and under backbone a ViT with layer scale and a mask_token"
    if tensors and all(SCRIPT.match(key) for key in tensors):
        return "classifiers_dict, as the evaluation script saves it"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `backbone`, a path (`backbone.pth` beside the file); `classifier`, the name of
    one of the evaluation script's; and the backbone's.

    Raises:
        CheckpointError: the backbone is not DINOv2's, or has another number of features.
    """
    name, head = _classifier(container, arguments)
    backbone, _ = split_prefix(container.tensors, "backbone.")
    if not backbone:
        backbone = dict(open_backbone(container, arguments))
    width, features = backbone["cls_token"].shape[-1], head["weight"].shape[1]
    mean = "avgpool_False" not in name  # published heads read the mean patch token
    blocks, rest = divmod(features - mean * width, width)
    if rest or blocks < 1:
        raise CheckpointError(
            f"the classifier takes {features} features, which are not class tokens"
            f"{' and a mean patch token' if mean else ''} of {width} channels"
        )
    state = HeadState(
        {f"classifier.0.{name}": value for name, value in head.items()},
        {"layers": list(range(-blocks, 0)), "mean": "appended" if mean else None},
    )
    return dinov2_checkpoint(NAME, backbone, arguments, heads={"linear": state})


def _classifier(
    container: Container, arguments: Mapping[str, Any]
) -> tuple[str, dict[str, Tensor]]:
    """A classifier's name and its `weight` and `bias`."""
    tensors = container.tensors
    if tensors.keys() == PUBLISHED:
        return "", dict(tensors)
    if "linear_head.weight" in tensors:
        return "", split_prefix(tensors, "linear_head.")[0]
    named: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if (match := SCRIPT.match(key)) is not None:
            named.setdefault(match[1], {})[match[2]] = value
    name = str(arguments.get("classifier", next(iter(named)) if len(named) == 1 else ""))
    if name not in named:
        raise CheckpointError(
            f"{container.path} has {len(named)} classifiers; set arguments = {{classifier = ...}}: "
            f"{', '.join(named)}"
        )
    return name, named[name]


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`embedding`, the classifier's input, and `cls_embedding`, the backbone's pooled output."""
    head: Any = run.heads["classify"]
    return {"embedding": head.features(run.output), "cls_embedding": run.trunk.pool(run.output)}
