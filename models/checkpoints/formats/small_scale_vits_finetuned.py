"""Small-scale ViTs' fine-tuned classifiers (arXiv 2210.07240).

A ViT, Swin or CaiT with its head under `model_state_dict`. Upstream is
github.com/hananshafi/vits-for-small-scale-datasets.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.small_scale import image_size, preprocess_for, with_dataset
from models.checkpoints.families.swin import MARK, swin_checkpoint
from models.checkpoints.families.vit import MARKS, vit_checkpoint
from models.networks import OWN

NAME = "small-scale-vits-finetuned"
CAIT = "blocks_token_only.0.attn.q.weight"
FLAT_PATCH = "patch_embed.1."
HEADS = {192: 12}  # of the published ViT

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    known = keys >= MARKS or MARK in keys or CAIT in keys
    if container.wrapper == "model_state_dict" and "head.weight" in keys and known:
        return "a ViT, Swin or CaiT with its head under model_state_dict"
    if CAIT in keys and f"{FLAT_PATCH}weight" in keys:
        return "a CaiT whose patches are embedded by a linear layer"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    return with_dataset(_convert(container.tensors, arguments), arguments)


def _convert(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Checkpoint:
    preprocess = preprocess_for(arguments)
    if CAIT in tensors:
        return _cait(tensors, arguments)
    if MARK in tensors:
        return swin_checkpoint(
            NAME, tensors, arguments, preprocess=preprocess, img_size=image_size(arguments)
        )
    return vit_checkpoint(
        NAME, tensors, arguments, positions="dino", preprocess=preprocess, published=HEADS
    )


def _cait(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Checkpoint:
    """A CaiT (arXiv 2103.17239) in timm's names.

    Upstream flattens patches by row, column and channel and embeds them by a linear layer, which is
    the convolution of the same weights.
    """
    named = {k: v for k, v in tensors.items() if not k.startswith(FLAT_PATCH)}
    flat = tensors[f"{FLAT_PATCH}weight"]
    dim, patch = flat.shape[0], round((flat.shape[1] / 3) ** 0.5)
    kernel = flat.reshape(dim, patch, patch, 3).permute(0, 3, 1, 2).contiguous()
    named["patch_embed.proj.weight"] = kernel
    named["patch_embed.proj.bias"] = tensors[f"{FLAT_PATCH}bias"]
    side = round(tensors["pos_embed"].shape[1] ** 0.5)
    only = "blocks_token_only."
    built = {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": len({k.split(".")[1] for k in tensors if k.startswith("blocks.")}),
        "depth_token_only": len({k.split(".")[1] for k in tensors if k.startswith(only)}),
        "num_heads": tensors["blocks.0.attn.proj_l.weight"].shape[0],
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "mlp_ratio_token_only": tensors[f"{only}0.mlp.fc1.weight"].shape[0] / dim,
        "num_classes": tensors["head.weight"].shape[0],
    }
    size = (side * patch, side * patch)
    return Checkpoint(
        format=NAME,
        architecture="cait",
        library=OWN,
        arguments=built,
        state_dict=named,
        preprocess=replace(preprocess_for(arguments), input_size=size),
    )
