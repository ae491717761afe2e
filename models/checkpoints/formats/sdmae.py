"""SdMAE's training checkpoint (github.com/Talented-Q/SDMAE).

MAE's keys with the encoder under `encoder.`. Contrastive branches, a predictor and a head that
predicts a patch's location are parts that only training uses.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.mae import DECODER, decoder_assumed, decoder_state, request
from models.checkpoints.families.mae import outputs as mae_outputs
from models.checkpoints.families.vit import split_prefix, vit_checkpoint
from models.heads.linear import create_classifier
from models.reference_outputs import ReferenceRun

NAME = "sdmae"

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if "encoder.cls_token" in keys and "locality.0.weight" in keys:
        return "encoder, locality and contrastive branches"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    kept, others = split_prefix(container.tensors, "encoder.")
    heads = decoder_state(container, arguments)
    location = {
        key.replace("locality.", "classifier."): value
        for key, value in container.tensors.items()
        if key.startswith("locality.")
    }
    heads["location"] = HeadState(location)
    dropped = tuple(key for key in others if not key.startswith((*DECODER, "locality.")))
    return vit_checkpoint(
        NAME,
        kept,
        arguments,
        positions="bicubic",
        heads=heads,
        dropped=dropped,
        assumed=decoder_assumed(heads, container, arguments),
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """MAE's outputs, and `location_logits` (B, N, N): the predicted location of each patch."""
    named = mae_outputs(run)
    locate = create_classifier(run.states["location"]).to(run.output.features.device)
    patches = run.output.patches_BTD
    if patches.shape[1] == locate[-1].out_features:
        with torch.no_grad():
            named["location_logits"] = locate(patches)
    return named
