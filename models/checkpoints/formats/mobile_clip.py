"""MobileCLIP (arXiv 2311.17049, github.com/apple/ml-mobileclip) in Apple's files: S0, S1, S2, B.

open_clip translates the names. Two towers are of `models/networks/mobile_clip.py`: S0's of texts,
which open_clip does not have, and B's of images, of which timm's gives other embeddings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.convert import convert_mobile_clip_state_dict
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.open_clip import Configuration, read_configuration
from models.checkpoints.families.open_clip_towers import convert_towers
from models.errors import CheckpointError
from models.networks import create_own

NAME = "mobile-clip"
IMAGE, TEXT = "image_encoder.model.", "text_encoder."
VIT = f"{IMAGE}patch_emb.0.block.conv.weight"  # of B


@dataclass(frozen=True, slots=True)
class Variant:
    """One of Apple's models.

    Args:
        name: what open_clip calls the one whose towers have these sizes.
        image, text: the towers' networks.
        layers: the text tower's layers, where they are not those of `name`.
    """

    name: str
    image: str = "open-clip-image"
    text: str = "open-clip-text"
    layers: int | None = None


VARIANTS = {
    "S0": Variant("MobileCLIP2-S0", text="mobile-clip-s0-text", layers=4),
    "S1": Variant("MobileCLIP-S1"),
    "S2": Variant("MobileCLIP-S2"),
    "B": Variant("MobileCLIP-B", image="mobile-clip-b-image"),
}


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if f"{TEXT}projection_layer" in keys and any(key.startswith(IMAGE) for key in keys):
        return "towers in Apple's names: image_encoder.model. and text_encoder."
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """The network is the one of S0, S1, S2 and B that has these weights.

    Raises:
        CheckpointError: none has.
    """
    tensors = container.tensors
    left = [key for key in tensors if not key.startswith((IMAGE, TEXT)) and key != "logit_scale"]
    is_vit = VIT in tensors
    for name, variant in VARIANTS.items():
        if is_vit != (name == "B"):
            continue
        config = _configuration(container, variant)
        state = _expected(variant, config)
        network = SimpleNamespace(visual=state.pop("visual"))
        named: dict[str, Tensor] = convert_mobile_clip_state_dict(
            network, dict(tensors), fastvit=not is_vit
        )
        shapes = {key: tuple(value.shape) for key, value in named.items()}
        if left or shapes != {key: tuple(value.shape) for key, value in state.items()}:
            continue
        checkpoint = convert_towers(NAME, replace(container, tensors=named), config)
        built = dict(checkpoint.arguments)
        for tower, architecture in (("image", variant.image), ("text", variant.text)):
            built[tower] = {**built[tower], "architecture": architecture}
        return replace(checkpoint, arguments=built)
    raise CheckpointError(
        f"{container.path}: MobileCLIP, but none of {', '.join(VARIANTS)} with all their weights "
        "and no others"
    )


def _configuration(container: Container, variant: Variant) -> Configuration:
    config = read_configuration(container, {"architecture": variant.name})
    if variant.layers is None:
        return config
    text = {**config.model["text_cfg"], "layers": variant.layers}
    return replace(config, model={**config.model, "text_cfg": text})


def _expected(variant: Variant, config: Configuration) -> dict[str, Any]:
    """The state dict that the networks have, on the meta device, and the image tower `visual`."""
    shared = {"embed_dim": config.model["embed_dim"], "quick_gelu": False}
    with torch.device("meta"):
        image = create_own(variant.image, config=config.model["vision_cfg"], **shared)
        text = create_own(variant.text, config=config.model["text_cfg"], **shared)
        state: dict[str, Any] = {"visual": image, "logit_scale": torch.zeros(())}
    state |= {f"visual.{key}": value for key, value in image.state_dict().items()}
    return state | {f"text.{key}": value for key, value in text.state_dict().items()}
