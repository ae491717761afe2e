"""DINOv2's backbones (arXiv 2304.07193, github.com/facebookresearch/dinov2) in timm's names."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.companions import open_companion
from models.checkpoints.families.heads import VIT
from models.checkpoints.families.known import Known, flag, number
from models.checkpoints.families.vit import in_timms_names, vit_checkpoint
from models.errors import CheckpointError

BACKBONES = ("backbone.pth", "backbone.safetensors")
BLOCK = re.compile(r"^blocks\.(?:\d+\.)?0\.ls1\.gamma$")
CHUNK = re.compile(r"^blocks\.\d+\.(\d+\.)")
HEADS = {**VIT, 1536: 24}  # as published, with the giant
# Pixels of a side. Published tables are those of the end of training; upstream evaluates at less.
PUBLISHED_SIZE, EVALUATED_SIZE = 518, 224
# By (interpolate_offset, interpolate_antialias).
POSITIONS = {(0.1, False): "dino", (0.0, True): "antialias", (0.0, False): "bicubic"}


def is_dinov2(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is a whole DINOv2 backbone in upstream's names."""
    needed = {"cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "norm.weight"}
    return tensors.keys() >= needed and any(BLOCK.match(key) for key in tensors)


def open_backbone(container: Container, arguments: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The backbone of a head's file: its companion `backbone`, in upstream's names.

    Raises:
        CheckpointError: there is none, or it is not DINOv2's.
    """
    companion = open_companion(container, arguments, "backbone", BACKBONES)
    if not is_dinov2(companion.tensors):
        raise CheckpointError(f"{companion.path}: not a DINOv2 backbone as it is published")
    return companion.tensors


def dinov2_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in timm's names. Blocks in chunks, as training saves them, are numbered through
    already."""
    kept = {CHUNK.sub(r"blocks.\1", k): v for k, v in tensors.items() if k != "mask_token"}
    return in_timms_names(kept)


def dinov2_checkpoint(
    name: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    heads: Mapping[str, HeadState] | None = None,
    dropped: tuple[str, ...] = (),
    **built: Any,
) -> Checkpoint:
    """A DINOv2 backbone as a checkpoint of format `name`.

    Args:
        tensors: the backbone in upstream's names.
        arguments: `num_heads` (as published); `interpolate_offset` and `interpolate_antialias`, by
            which positions are resized (0.1 and false; with registers 0 and true); `img_size` to
            serve (224 where positions are of 518 pixels).

    Raises:
        CheckpointError: no published network resizes positions like that.
    """
    known = Known(arguments)
    registers = "register_tokens" in tensors
    offset = number(
        "interpolate_offset", known.get("interpolate_offset", 0.0 if registers else 0.1)
    )
    antialias = flag("interpolate_antialias", known.get("interpolate_antialias", registers))
    if (offset, antialias) not in POSITIONS:
        raise CheckpointError(
            f"interpolate_offset {offset} with interpolate_antialias {antialias} is not how a "
            "published DINOv2 resizes positions: 0.1 and false, or with registers 0 and true"
        )
    checkpoint = vit_checkpoint(
        name,
        dinov2_tensors(tensors),
        arguments,
        positions=POSITIONS[offset, antialias],
        heads=heads,
        dropped=(*dropped, "mask_token"),
        assumed=known.assumed,
        gated=any(key.endswith(".mlp.w12.weight") for key in tensors),
        published=HEADS,
        **{"whole_patches": True, **built},
    )
    size, preprocess = checkpoint.arguments["img_size"], checkpoint.preprocess
    if size != PUBLISHED_SIZE or known.find("img_size") is not None or preprocess is None:
        return checkpoint
    return replace(
        checkpoint,
        preprocess=replace(preprocess, input_size=(EVALUATED_SIZE, EVALUATED_SIZE)),
        assumed={**checkpoint.assumed, "img_size": EVALUATED_SIZE},
    )
