"""MobileCLIP (arXiv 2311.17049, github.com/apple/ml-mobileclip): Apple's files of S1 and S2.

open_clip has these networks and translates their names. Others are refused: S0 has a text tower
that open_clip does not have, and timm's network of B gives other embeddings than Apple's.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.convert import convert_mobile_clip_state_dict
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.open_clip import read_configuration
from models.checkpoints.families.open_clip_towers import convert_towers
from models.errors import CheckpointError
from models.networks import create_own

NAME = "mobile-clip"
IMAGE, TEXT = "image_encoder.model.", "text_encoder."
ARCHITECTURES = ("MobileCLIP-S1", "MobileCLIP-S2")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if f"{TEXT}projection_layer" in keys and any(key.startswith(IMAGE) for key in keys):
        return "towers in Apple's names: image_encoder.model. and text_encoder."
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """The network is the one of S1 and S2 that has these weights.

    Raises:
        CheckpointError: neither has.
    """
    tensors = container.tensors
    left = [key for key in tensors if not key.startswith((IMAGE, TEXT)) and key != "logit_scale"]
    for architecture in ARCHITECTURES:
        config = read_configuration(container, {"architecture": architecture})
        state = _expected(config.model)
        network = SimpleNamespace(visual=state.pop("visual"))
        named: dict[str, Tensor] = convert_mobile_clip_state_dict(network, dict(tensors))
        shapes = {key: tuple(value.shape) for key, value in named.items()}
        fits = shapes == {key: tuple(value.shape) for key, value in state.items()}
        if fits and not left:
            return convert_towers(NAME, replace(container, tensors=named), config)
    raise CheckpointError(
        f"{container.path}: MobileCLIP, but neither {' nor '.join(ARCHITECTURES)} with all their "
        "weights and no others; S0 and B are not supported"
    )


def _expected(model: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that open_clip's network has, on the meta device, and its tower `visual`."""
    shared = {"embed_dim": model["embed_dim"], "quick_gelu": False}
    with torch.device("meta"):
        image = create_own("open-clip-image", config=model["vision_cfg"], **shared)
        text = create_own("open-clip-text", config=model["text_cfg"], **shared)
        state: dict[str, Any] = {"visual": image, "logit_scale": torch.zeros(())}
    state |= {f"visual.{key}": value for key, value in image.state_dict().items()}
    return state | {f"text.{key}": value for key, value in text.state_dict().items()}
