"""PiT (arXiv 2103.16302, github.com/naver-ai/pit): a flat state dict, plain or distilled."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN
from models.reference_outputs import ReferenceRun

NAME = "pit"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if {"pools.0.conv.weight", "patch_embed.conv.weight", "cls_token"} <= keys:
        return "transformers and pools, with a convolution that embeds patches"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `stride` of the overlapping patches (8), `heads` (2, 4, 8), `image_size`.

    Raises:
        CheckpointError: `heads` do not divide the stages' widths.
    """
    tensors = container.tensors
    # in timm's names pooling begins the next stage
    named = {
        re.sub(r"^pools\.(\d)\.", lambda m: f"transformers.{int(m[1]) + 1}.pool.", key): value
        for key, value in tensors.items()
    }
    _, _, side, _ = tensors["pos_embed"].shape
    patch = tensors["patch_embed.conv.weight"].shape[-1]
    stride = int(arguments.get("stride", 8))
    stages = sorted({int(k.split(".")[1]) for k in tensors if k.startswith("transformers.")})
    widths = [tensors[f"transformers.{stage}.blocks.0.norm1.weight"].shape[0] for stage in stages]
    heads = list(arguments.get("heads", (2, 4, 8)))
    if len(heads) != len(stages) or any(w % h for w, h in zip(widths, heads, strict=True)):
        raise CheckpointError(f"heads are {heads}; each must divide its stage's width, {widths}")
    blocks = "transformers.{}.blocks."
    head = tensors.get("head.weight")
    size = (side - 1) * stride + patch
    size = int(arguments.get("image_size", size))
    return Checkpoint(
        format=NAME,
        architecture="pit",
        library=OWN,
        arguments={
            "img_size": size,
            "patch_size": patch,
            "stride": stride,
            "base_dims": [w // h for w, h in zip(widths, heads, strict=True)],
            "depth": [
                len({k.split(".")[3] for k in tensors if k.startswith(blocks.format(stage))})
                for stage in stages
            ],
            "heads": heads,
            "mlp_ratio": tensors["transformers.0.blocks.0.mlp.fc1.weight"].shape[0] / widths[0],
            "distilled": "head_dist.weight" in tensors,
            "num_classes": 0 if head is None else head.shape[0],
        },
        state_dict=named,
        preprocess=Preprocess(input_size=(size, size), crop_pct=0.9),
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """The class token, the last stage's map before the norm, and each head's own logits."""
    network = run.network
    tokens = run.output.features
    stages = network.forward_intermediates(run.inputs["pixel_values"], intermediates_only=True)
    named = {"embedding": tokens[:, 0], "feature_map": stages[-1]}
    if network.head_dist is not None:
        named |= {
            "embedding_dist": tokens[:, 1],
            "logits_cls": network.head(tokens[:, 0]),
            "logits_dist": network.head_dist(tokens[:, 1]),
        }
    return named
