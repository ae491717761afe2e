"""DHVT (arXiv 2210.05958, github.com/ArieSeirack/DHVT), in DeiT's container.

`model` is served, as upstream evaluates it; `weights="ema"` selects the exponential average.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.known import Known
from models.checkpoints.families.vit import choose_weights
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

NAME = "dhvt"
MARKS = {"blocks.0.attn.ht_proj.weight", "patch_embed.pre_affine.alpha"}
# The patch size by the number of entries in the stem.
PATCHES = {1: 2, 2: 4, 4: 16}


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if container.tensors.keys() >= MARKS:
        return "attention with ht_proj, and a stem with pre_affine"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights`, `img_size` (that of training, else 32, or 224 for patches of 16)."""
    tensors = choose_weights(container, arguments, container.wrapper)
    stem = {k.split(".")[2] for k in tensors if k.startswith("patch_embed.proj.")}
    if len(stem) not in PATCHES:
        raise CheckpointError(
            f"{container.path}: its stem has {len(stem)} layers; there are networks for "
            f"{', '.join(map(str, PATCHES))}"
        )
    patch = PATCHES[len(stem)]
    known = Known(arguments, container.script)
    size = known.image_size(32 if patch < 16 else 224)
    heads, dim = tensors["blocks.0.attn.pos_embed"].shape[1:]
    return Checkpoint(
        format=NAME,
        architecture=NAME,
        library=OWN,
        arguments={
            "patch_size": patch,
            "embed_dim": dim,
            "depth": len({k.split(".")[1] for k in tensors if k.startswith("blocks.")}),
            "num_heads": heads,
            "hidden": tensors["blocks.0.mlp.conv1.weight"].shape[0],
            "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
            "num_classes": tensors["head.weight"].shape[0],
        },
        state_dict=dict(tensors),
        preprocess=Preprocess(input_size=size, crop_pct=0.875 if size[0] > 32 else 1.0),
        assumed=known.assumed,
    )
