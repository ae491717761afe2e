"""SigLIP (arXiv 2303.15343) and SigLIP 2 (arXiv 2502.14786) as Google publishes them
(github.com/google-research/big_vision): `.npz` files of a ViT and a text transformer.

A learned query pools the image's patches. Blocks are numbered, or stacked along a first axis.
Embeddings have unit length. Texts need the tokenizer of open_clip's model beside the file.
Variants for inputs of any shape (NaFlex) are not supported.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.jax import (
    ENCODER,
    POSITIONS,
    TRUNCATED,
    attention_inputs,
    from_jax,
    in_old_names,
    num_heads,
)
from models.checkpoints.families.jax_text import TEXT_KEYS, text_transformer, without_numbers
from models.checkpoints.families.known import Known
from models.checkpoints.families.towers import LIBRARY, tower_states
from models.checkpoints.families.vit import split_prefix, vit_arguments
from models.errors import CheckpointError

NAME = "siglip"
ROOT = "params/"
STACKED = "/encoderblock/"
POOL = "MAPHead_0/"
ATTENTION = f"{POOL}MultiHeadDotProductAttention_1"
IMAGE_KEYS = re.compile(
    rf"embedding/(kernel|bias)|{POSITIONS}|Transformer/({ENCODER})|{POOL}(probe|"
    r"LayerNorm_0/(scale|bias)|MlpBlock_3/Dense_[01]/(kernel|bias)|"
    r"MultiHeadDotProductAttention_1/(query|key|value|out)/(kernel|bias))"
)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = {key.removeprefix(ROOT) for key in container.tensors}
    if {f"img/{POOL}probe", "txt/Embed_0/embedding"} <= keys:
        return "a JAX ViT that a query pools under img/, and a text transformer under txt/"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `act`, the name of an activation in timm (`gelu_tanh`); `pool_type` of the text
    transformer (`last`).

    Raises:
        CheckpointError: a tower is not as published.
    """
    named = {key.removeprefix(ROOT): value for key, value in container.tensors.items()}
    tensors = in_old_names(_unstacked(named))
    img, rest = split_prefix(tensors, "img/")
    if "pos_embedding" in img:
        img[POSITIONS] = img.pop("pos_embedding")
    txt = without_numbers(split_prefix(tensors, "txt/")[0])
    left = [key for key in rest if not key.startswith("txt/") and key not in ("t", "b")]
    left += [f"img/{key}" for key in img if not IMAGE_KEYS.fullmatch(key)]
    left += [f"txt/{key}" for key in txt if not TEXT_KEYS.fullmatch(key)]
    if left:
        raise CheckpointError(f"{container.path}: left over: {', '.join(left[:10])}")
    if img["embedding/kernel"].dim() != 4:
        raise CheckpointError(
            f"{container.path}: patches come flattened (NaFlex), which is not supported"
        )
    known = Known(arguments)
    text, language = text_transformer(txt, known)
    vision = from_jax(img) | _pool(img)
    image = vit_arguments(vision, {"num_heads": num_heads(img)})
    if language["output_dim"] != image["embed_dim"]:
        raise CheckpointError(
            f"{container.path}: embeddings of texts have {language['output_dim']} dimensions, "
            f"those of images {image['embed_dim']}"
        )
    image |= {
        "act_layer": str(arguments.get("act", "gelu_tanh")),
        "class_token": False,
        "global_pool": "map",
    }
    state = tower_states(vision, text, tensors["t"])
    if "b" in tensors:
        state["logit_bias"] = tensors["b"]
    words, size = language["vocab_size"], image["img_size"]
    return Checkpoint(
        format=NAME,
        architecture=f"SigLIP with a ViT of width {image['embed_dim']}",
        library=LIBRARY,
        arguments={
            "image": {"architecture": "lit-vit", "positions": "fixed", **image},
            "text": language,
            "tokenizer": {
                "name": "hub",
                "source": f"a vocabulary of {words} words",
                "options": {"clean": "canonicalize"},
                "folder": str(container.path.parent.absolute()),
            },
        },
        state_dict=state,
        preprocess=replace(TRUNCATED, input_size=(size, size)),
        assumed=known.assumed,
    )


def _unstacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with numbered blocks."""
    named = {}
    for key, value in tensors.items():
        if STACKED not in key:
            named[key] = value
            continue
        for number, block in enumerate(value):
            named[key.replace(STACKED, f"/encoderblock_{number}/")] = block
    return named


def _pool(img: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pooling by a query under timm's names."""
    named = {"latent": img[f"{POOL}probe"]}
    for ours, parts in (("q", ("query",)), ("kv", ("key", "value"))):
        named[f"{ours}.weight"], named[f"{ours}.bias"] = attention_inputs(img, ATTENTION, parts)
    named["proj.weight"] = img[f"{ATTENTION}/out/kernel"].flatten(0, 1).T
    named["proj.bias"] = img[f"{ATTENTION}/out/bias"]
    named["norm.weight"] = img[f"{POOL}LayerNorm_0/scale"]
    named["norm.bias"] = img[f"{POOL}LayerNorm_0/bias"]
    for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
        named[f"mlp.{ours}.weight"] = img[f"{POOL}MlpBlock_3/{theirs}/kernel"].T
        named[f"mlp.{ours}.bias"] = img[f"{POOL}MlpBlock_3/{theirs}/bias"]
    return {f"attn_pool.{key}": value.contiguous() for key, value in named.items()}
