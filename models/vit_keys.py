"""What a ViT's state dict in timm's names says of its architecture."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.errors import CheckpointError

MARKS = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}


def vit_arguments(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of timm's `VisionTransformer` that a state dict's shapes tell; the number of
    heads is in no shape: `arguments["num_heads"]`, or else a head for every 64 channels.

    Raises:
        CheckpointError: the heads do not divide the channels.
    """
    dim, _, _, patch = tensors["patch_embed.proj.weight"].shape
    prefix = sum(name in tensors for name in ("cls_token", "dist_token"))
    cells = tensors["pos_embed"].shape[1] - prefix
    side = round(cells**0.5)
    heads = int(arguments.get("num_heads", max(1, dim // 64)))
    if dim % heads:
        raise CheckpointError(f"num_heads is {heads}, which does not divide {dim} channels")
    head = tensors.get("head.weight")
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
        "num_heads": heads,
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "num_classes": 0 if head is None else head.shape[0],
    }
