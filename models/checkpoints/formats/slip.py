"""SLIP's zoo (arXiv 2112.12750, github.com/facebookresearch/SLIP): SLIP, CLIP and SimCLR models.

`args.model` beside the weights names the model, such as `SLIP_VITS16`. A SimCLR has no text tower,
and is served as a plain ViT.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.heads import assumed, head_count
from models.checkpoints.families.towers import LIBRARY, text_arguments, tower_states
from models.checkpoints.families.vit import split_prefix, vit_arguments, vit_checkpoint
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess

NAME = "slip"
TEXT = ("positional_embedding", "text_projection", "token_embedding.", "transformer.", "ln_final.")
TRAINING = "image_mlp."
# Heads of the published image towers by their channels: ViT-S has 12, of 32 channels each.
HEADS = {384: 12, 768: 12, 1024: 16}
PREPROCESS = Preprocess(crop_pct=1.0, interpolation="bilinear")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if "visual.blocks.0.attn.qkv.weight" not in keys or "visual_ema.cls_token" in keys:
        return None
    if {"image_projection", "text_projection", "logit_scale"} <= keys:
        return "a ViT with image_projection, and CLIP's text tower"
    if f"{TRAINING}layer1.weight" in keys:
        return "a ViT and image_mlp, SimCLR's projector"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `vision_heads` and `transformer_heads`, for other widths than the published."""
    vision, others = split_prefix(container.tensors, "visual.")
    width = vision["cls_token"].shape[-1]
    heads = head_count(width, arguments, name="vision_heads", published=HEADS)
    counts = {"vision_heads": heads}
    training = tuple(key for key in others if key.startswith(TRAINING))
    if "image_projection" not in container.tensors:
        simclr = vit_checkpoint(
            NAME,
            vision,
            {"num_heads": heads},
            positions="fixed",
            preprocess=PREPROCESS,
            dropped=training,
        )
        return replace(simclr, assumed=assumed(arguments, **counts))
    tensors = container.tensors
    text = {key: tensors[key] for key in others if key.startswith(TEXT)}
    expected = {*text, *training, "image_projection", "logit_scale"}
    if left := [key for key in others if key not in expected]:
        raise CheckpointError(f"{container.path}: left over: {', '.join(left[:10])}")
    language = text_arguments(text, arguments, "transformer_heads")
    counts["transformer_heads"] = language["heads"]
    image = vit_arguments(vision, {"num_heads": heads})
    projection = tensors["image_projection"]
    if projection.dim() != 2 or projection.shape[1] != language["output_dim"]:
        raise CheckpointError(
            f"{container.path}: image_projection {tuple(projection.shape)} does not end in the "
            f"{language['output_dim']} dimensions of text_projection"
        )
    size = image["img_size"]
    return Checkpoint(
        format=NAME,
        architecture=f"SLIP with a ViT of width {width}",
        library=LIBRARY,
        arguments={
            "image": {
                "architecture": "projected-vit",
                "positions": "fixed",
                "projected": projection.shape[1],
                **image,
            },
            "text": language,
            "tokenizer": {"name": "cutting"},
        },
        assumed=assumed(arguments, **counts),
        state_dict=tower_states({**vision, "projection": projection}, text, tensors["logit_scale"]),
        preprocess=replace(PREPROCESS, input_size=(size, size)),
        dropped=training,
    )
