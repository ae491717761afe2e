"""Google's `.npz` MLP-Mixers (arXiv 2105.01601, github.com/google-research/vision_transformer).
Images are transformed as for ViTs (`augreg`), also SAM's and those trained from scratch.

As with the ViTs of that code, GELU is approximated by tanh; `arguments = {act = "gelu"}` selects
timm's exact one. The input size is that of the first layer over tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.jax import ASSUMED, PREPROCESS
from models.checkpoints.families.ratios import mlp_ratio
from models.errors import CheckpointError
from models.networks import OWN

NAME = "mixer"
MARK = "MixerBlock_0/token_mixing/Dense_0/kernel"
RENAMED = (
    ("pre_head_layer_norm/", "norm."),
    ("MixerBlock_", "blocks."),
    ("/LayerNorm_0/", ".norm1."),
    ("/LayerNorm_1/", ".norm2."),
    ("/token_mixing/", ".mlp_tokens."),
    ("/channel_mixing/", ".mlp_channels."),
    ("Dense_0/", "fc1."),
    ("Dense_1/", "fc2."),
    ("stem/", "stem.proj."),
    ("head/", "head."),
)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if {MARK, "stem/kernel"} <= _tensors(container).keys():
        return "a stem and MixerBlocks"
    return None


def _tensors(container: Container) -> dict[str, Tensor]:
    """The tensors without an optimizer's prefix."""
    return {key.removeprefix("opt/target/"): value for key, value in container.tensors.items()}


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `act`, the name of an activation in timm (`gelu_tanh`).

    Raises:
        CheckpointError: the tokens are not those of a square grid.
    """
    tensors = _tensors(container)
    patch, _, _, dim = tensors["stem/kernel"].shape
    cells, tokens_hidden = tensors[MARK].shape
    side = math.isqrt(cells)
    if side**2 != cells:
        raise CheckpointError(f"{MARK} is for {cells} tokens, which are not a square grid")
    hidden = tensors["MixerBlock_0/channel_mixing/Dense_0/kernel"].shape[1]
    head = tensors.get("head/kernel")
    size = (side * patch, side * patch)
    return Checkpoint(
        format=NAME,
        architecture="mixer",
        library=OWN,
        arguments={
            "img_size": size,
            "patch_size": patch,
            "embed_dim": dim,
            "num_blocks": len({k.split("/")[0] for k in tensors if k.startswith("MixerBlock_")}),
            "mlp_ratio": (mlp_ratio(tokens_hidden, dim), mlp_ratio(hidden, dim)),
            "act_layer": str(arguments.get("act", "gelu_tanh")),
            "num_classes": 0 if head is None else head.shape[1],
        },
        state_dict=dict(_in_timms_names(key, value) for key, value in tensors.items()),
        preprocess=replace(PREPROCESS, input_size=size),
        assumed=ASSUMED,
    )


def _in_timms_names(key: str, value: Tensor) -> tuple[str, Tensor]:
    for theirs, ours in RENAMED:
        key = key.replace(theirs, ours)
    if key.endswith("scale"):
        return key.removesuffix("scale") + "weight", value
    if key.endswith("kernel"):
        weight = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.T
        return key.removesuffix("kernel") + "weight", weight.contiguous()
    return key, value
