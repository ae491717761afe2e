"""MAE's pre-training (arXiv 2111.06377, github.com/facebookresearch/mae).

The encoder in timm's names under `model`, alone, as it is published for transfer, or with the
decoder. Encoders of SdMAE and others have the same layout.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.mae import (
    DECODER,
    ENCODER,
    decoder_assumed,
    decoder_state,
    outputs,
    request,
    without_decoder,
)
from models.checkpoints.families.vit import MARKS, vit_checkpoint

NAME = "mae"

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if container.wrapper != "model" or "architecture" in arguments:
        return None
    if "teacher_model" in container.script or not keys >= MARKS:
        return None
    if all(key.startswith((*ENCODER, *DECODER)) for key in keys):
        decoder = "with" if "decoder_pred.weight" in keys else "without"
        return f"a ViT in timm's names under model, {decoder} a decoder, no classifier"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    kept, dropped = without_decoder(container.tensors)
    heads = decoder_state(container, arguments)
    return vit_checkpoint(
        NAME,
        kept,
        arguments,
        positions="bicubic",
        heads=heads,
        dropped=() if heads else dropped,
        assumed=decoder_assumed(heads, container, arguments),
    )
