"""A-CLIP (arXiv 2212.08653, github.com/microsoft/A-CLIP): both towers and their averages.

One state dict holds the trained towers, their exponential averages, and parts that only training
uses. The averages are served, as upstream evaluates them; `weights="online"` selects the trained
towers. Both sets share the text tower's token embedding, positions and last norm.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.heads import assumed, head_count
from models.checkpoints.families.towers import LIBRARY, text_arguments, tower_states
from models.checkpoints.families.vit import split_prefix, vit_arguments
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.reference_outputs import ReferenceRun
from models.trunks.base import Trunk
from models.trunks.features import FeatureRequest

NAME = "a-clip"
SHARED = ("token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias")
# By set: the image tower, both projections, and the text transformer.
SETS = {
    "ema": ("visual_ema.", "image_projection_e", "text_projection_e", "transformer_e."),
    "online": ("visual.", "image_projection", "text_projection", "transformer."),
}

# Heads of the published image towers by their channels: ViT-S has 12, of 32 channels each.
HEADS = {384: 12, 768: 12, 1024: 16}


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if {"visual_ema.cls_token", "image_projection_e"} <= container.tensors.keys():
        return "visual_ema and image_projection_e"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights` (`ema`), `vision_heads` and `transformer_heads` (as published)."""
    tensors = container.tensors
    weights = str(arguments.get("weights", "ema"))
    if weights not in SETS:
        raise CheckpointError(f"{container.path} has no weights {weights!r}; it has ema, online")
    visual, image_projection, text_projection, transformer = SETS[weights]
    vision, _ = split_prefix(tensors, visual)
    language, _ = split_prefix(tensors, transformer)
    try:
        projection = tensors[image_projection]
        text = {name: tensors[name] for name in SHARED}
        text["text_projection"] = tensors[text_projection]
        scale = tensors["logit_scale"]
    except KeyError as error:
        raise CheckpointError(f"{container.path}: the weight {error} is missing") from error
    text |= {f"transformer.{key}": value for key, value in language.items()}
    width = vision["cls_token"].shape[-1]
    heads = head_count(width, arguments, name="vision_heads", published=HEADS)
    image = vit_arguments(vision, {"num_heads": heads})
    size = image["img_size"]
    language_config = text_arguments(text, arguments, "transformer_heads")
    if projection.dim() != 2 or projection.shape[1] != language_config["output_dim"]:
        raise CheckpointError(
            f"{container.path}: {image_projection} {tuple(projection.shape)} does not end in the "
            f"{language_config['output_dim']} dimensions of {text_projection}"
        )
    return Checkpoint(
        format=NAME,
        architecture=f"A-CLIP with a ViT of width {image['embed_dim']}",
        library=LIBRARY,
        arguments={
            "image": {
                "architecture": "projected-vit",
                "positions": "bicubic",
                "projected": projection.shape[1],
                **image,
            },
            "text": language_config,
            "tokenizer": {"name": "cutting"},
        },
        assumed=assumed(arguments, vision_heads=heads, transformer_heads=language_config["heads"]),
        state_dict=tower_states({**vision, "projection": projection}, text, scale),
        preprocess=replace(
            Preprocess(), input_size=(size, size), crop_pct=1.0, interpolation="bilinear"
        ),
        dropped=tuple(
            key
            for key in tensors
            if key not in (*SHARED, "logit_scale", image_projection, text_projection)
            and not key.startswith((visual, transformer))
        ),
    )


def request(trunk: Trunk) -> FeatureRequest:
    """The attention of all blocks."""
    return FeatureRequest(attention=frozenset(range(len(trunk.blocks))))


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`tokens` (B, T, D), and `cls_attention` (B, N): the class token's attention to each patch, as
    the mean over layers and heads."""
    maps = torch.stack([layer[:, :, 0, 1:] for layer in run.output.attention.values()])
    return {"tokens": run.output.features, "cls_attention": maps.mean((0, 2))}
