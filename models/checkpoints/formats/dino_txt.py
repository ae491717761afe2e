"""dino.txt (arXiv 2412.16334, github.com/facebookresearch/dinov2): texts and images of DINOv2.

The file is the text encoder. The blocks on the image's tokens (`vision_head.pth`) and the DINOv2
backbone (`backbone.pth`) are companion files. The temperature is in none of them.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.companions import open_companion
from models.checkpoints.families.dinov2 import dinov2_checkpoint, is_dinov2
from models.checkpoints.families.heads import head_count
from models.checkpoints.families.known import Known, number
from models.checkpoints.families.ratios import mlp_ratio
from models.checkpoints.families.towers import LIBRARY, tower_states
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess

NAME = "dino-txt"
BACKBONES = ("backbone.pth", "backbone.safetensors")
HEADS = ("vision_head.pth", "vision_head.safetensors")
MARKS = {
    "backbone.token_embedding.weight",
    "backbone.blocks.0.attention.qkv.weight",
    "head.linear_projection.weight",
}
TEXT = (
    (r"^backbone\.positional_embedding$", "positional_embedding"),
    (r"^backbone\.(token_embedding|ln_final)\.", r"\1."),
    (r"^backbone\.blocks\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.attention_norm\.", ".ln_1."),
    (r"\.ffn_norm\.", ".ln_2."),
    (r"\.attention\.qkv\.", ".attn.in_proj_"),
    (r"\.attention\.proj\.", ".attn.out_proj."),
    (r"\.feed_forward\.fc1\.", ".mlp.c_fc."),
    (r"\.feed_forward\.fc2\.", ".mlp.c_proj."),
)
IMAGE = (
    (r"^ln_final\.", "head_norm."),
    (r"^block_list\.", "head_blocks."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
# What the published network was built with.
PUBLISHED = {"patch_token_layer": 1, "patch_tokens_pooler_type": "mean",
             "tokens_pooler_type": "argmax"}  # fmt: skip


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if container.tensors.keys() >= MARKS:
        return "a text encoder under backbone, with head.linear_projection"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `backbone` and `vision_head`, paths; `num_heads` of the backbone and
    `text_num_heads` (as published); `logit_scale`, a logarithm (log(1 / 0.07)); `img_size`
    in pixels (224).

    Raises:
        CheckpointError: a companion is missing or not DINOv2's, or an option is not the published.
    """
    known = Known(arguments)
    for name, value in PUBLISHED.items():
        if known.get(name, value) != value:
            raise CheckpointError(f"{name} is {arguments[name]!r}; the published has {value!r}")
    backbone = open_companion(container, arguments, "backbone", BACKBONES)
    if not is_dinov2(backbone.tensors):
        raise CheckpointError(f"{backbone.path}: not a DINOv2 backbone as it is published")
    head = open_companion(container, arguments, "vision_head", HEADS).tensors
    image = dinov2_checkpoint(NAME, backbone.tensors, arguments)
    text = {_renamed(key, TEXT): value for key, value in container.tensors.items()}
    text["text_projection"] = text.pop("head.linear_projection.weight").T.contiguous()
    for key in [key for key in text if key.endswith(".in_proj_weight")]:
        text[key.replace("weight", "bias")] = torch.zeros(len(text[key]))  # it has none
    length, width = text["positional_embedding"].shape
    heads = head_count(width, arguments, name="text_num_heads", published={1280: 20})
    known.get("text_num_heads", heads)
    scale = number("logit_scale", known.get("logit_scale", math.log(1 / 0.07)))
    vision = {_renamed(key, IMAGE): value for key, value in head.items()}
    return Checkpoint(
        format=NAME,
        architecture="dino.txt",
        library=LIBRARY,
        arguments={
            "image": {
                "architecture": "dino-txt-vit",
                "head_blocks": len({key.split(".")[1] for key in head if "block_list" in key}),
                "head_hidden": head["block_list.0.mlp.w1.weight"].shape[0],
                **image.arguments,
            },
            "text": {
                "context_length": length,
                "vocab_size": text["token_embedding.weight"].shape[0],
                "width": width,
                "heads": heads,
                "layers": len({k.split(".")[2] for k in text if k.startswith("transformer.")}),
                "mlp_ratio": mlp_ratio(len(text["transformer.resblocks.0.mlp.c_fc.weight"]), width),
                "output_dim": text["text_projection"].shape[1],
                "quick_gelu": False,
            },
            "tokenizer": {"name": "openai"},
        },
        state_dict=tower_states({**image.state_dict, **vision}, text, torch.tensor(scale)),
        preprocess=Preprocess(input_size=known.image_size()),
        dropped=image.dropped,
        assumed={**image.assumed, **known.assumed},
    )


def _renamed(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in names:
        key = re.sub(theirs, ours, key)
    return key
