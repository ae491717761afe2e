"""PiT (arXiv 2103.16302, github.com/naver-ai/pit): a flat state dict, plain or distilled."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.heads import assumed
from models.checkpoints.families.known import whole, wholes
from models.checkpoints.families.ratios import mlp_ratio
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN
from models.reference_outputs import ReferenceRun

NAME = "pit"
# Of PiT-Ti, XS, S and B: heads by the first stage's channels, and strides by patch size.
HEADS = {64: (2, 4, 8), 96: (2, 4, 8), 144: (3, 6, 12), 256: (4, 8, 16)}
STRIDES = {16: 8, 14: 7}


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if {"pools.0.conv.weight", "patch_embed.conv.weight", "cls_token"} <= keys:
        return "transformers and pools, with a convolution that embeds patches"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `stride` of the overlapping patches, `heads`, `image_size`; as published.

    Raises:
        CheckpointError: `stride` or `heads` are of no published size, or do not fit the widths.
    """
    tensors = container.tensors
    # in timm's names pooling begins the next stage
    named = {
        re.sub(r"^pools\.(\d)\.", lambda m: f"transformers.{int(m[1]) + 1}.pool.", key): value
        for key, value in tensors.items()
    }
    _, _, side, _ = tensors["pos_embed"].shape
    patch = tensors["patch_embed.conv.weight"].shape[-1]
    stride = arguments.get("stride", STRIDES.get(patch))
    if stride is None:
        raise CheckpointError(
            f"set stride, that of patches of {patch} pixels, such as {patch // 2}"
        )
    stride = whole("stride", stride)
    stages = sorted({int(k.split(".")[1]) for k in tensors if k.startswith("transformers.")})
    widths = [tensors[f"transformers.{stage}.blocks.0.norm1.weight"].shape[0] for stage in stages]
    stated = arguments.get("heads", HEADS.get(widths[0]))
    if stated is None:
        narrow, wide = ([max(1, width // size) for width in widths] for size in (32, 64))
        raise CheckpointError(
            f"no published PiT has stages of {widths} channels; set heads, one number for each, "
            f"such as {narrow} or {wide}"
        )
    heads = wholes("heads", stated)
    if len(heads) != len(stages) or any(w % h for w, h in zip(widths, heads, strict=True)):
        raise CheckpointError(f"heads are {heads}; each must divide its stage's width, {widths}")
    blocks = "transformers.{}.blocks."
    head = tensors.get("head.weight")
    size = (side - 1) * stride + patch
    size = whole("image_size", arguments.get("image_size", size))
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
            "mlp_ratio": mlp_ratio(
                len(tensors["transformers.0.blocks.0.mlp.fc1.weight"]), widths[0]
            ),
            "distilled": tensors["cls_token"].shape[1] == 2,
            "num_classes": 0 if head is None else head.shape[0],
        },
        state_dict=named,
        assumed=assumed(arguments, stride=stride, heads=heads, image_size=size),
        preprocess=Preprocess(input_size=(size, size), crop_pct=0.9),
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """The class token, the last stage's map before the norm, and each head's own logits."""
    network = run.network
    tokens = run.output.features
    stages = network.forward_intermediates(run.inputs["pixel_values"], intermediates_only=True)
    named = {"embedding": tokens[:, 0], "feature_map": stages[-1]}
    if network.head_dist is not None:
        named["embedding_dist"] = tokens[:, 1]
    if network.head_dist is not None and network.num_classes:
        named |= {
            "logits_cls": network.head(tokens[:, 0]),
            "logits_dist": network.head_dist(tokens[:, 1]),
        }
    return named
