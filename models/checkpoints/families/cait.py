"""CaiT (arXiv 2103.17239): timm's arguments from the shapes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.families.ratios import mlp_ratio
from models.inputs.transforms import Preprocess
from models.networks import OWN
from models.reference_outputs import ReferenceRun

CAIT = "blocks_token_only.0.attn.q.weight"
FLAT_PATCH = "patch_embed.1."


def cait_checkpoint(
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    preprocess: Preprocess,
    dropped: tuple[str, ...] = (),
    assumed: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """A CaiT in timm's names as a checkpoint of format `name`.

    Patches may be embedded by a linear layer over their rows, columns and channels, which is the
    convolution of the same weights.

    Args:
        preprocess: everything but the input size.
        dropped: keys that only training used.
        assumed: what neither the file nor the caller gave.
    """
    named = {k: v for k, v in tensors.items() if not k.startswith(FLAT_PATCH)}
    flat = tensors.get(f"{FLAT_PATCH}weight")
    if flat is not None:
        patch = round((flat.shape[1] / 3) ** 0.5)
        kernel = flat.reshape(len(flat), patch, patch, 3).permute(0, 3, 1, 2).contiguous()
        named["patch_embed.proj.weight"] = kernel
        named["patch_embed.proj.bias"] = tensors[f"{FLAT_PATCH}bias"]
    dim, _, _, patch = named["patch_embed.proj.weight"].shape
    size = round(tensors["pos_embed"].shape[1] ** 0.5) * patch
    only = "blocks_token_only."
    head = tensors.get("head.weight")
    return Checkpoint(
        format=name,
        architecture="cait",
        library=OWN,
        arguments={
            "img_size": size,
            "patch_size": patch,
            "embed_dim": dim,
            "depth": len({k.split(".")[1] for k in tensors if k.startswith("blocks.")}),
            "depth_token_only": len({k.split(".")[1] for k in tensors if k.startswith(only)}),
            "num_heads": tensors["blocks.0.attn.proj_l.weight"].shape[0],
            "mlp_ratio": mlp_ratio(len(tensors["blocks.0.mlp.fc1.weight"]), dim),
            "mlp_ratio_token_only": mlp_ratio(len(tensors[f"{only}0.mlp.fc1.weight"]), dim),
            "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
            "num_classes": 0 if head is None else head.shape[0],
        },
        state_dict=named,
        preprocess=replace(preprocess, input_size=(size, size)),
        dropped=dropped,
        assumed=assumed or {},
    )


def feature_map(run: ReferenceRun) -> dict[str, Tensor]:
    """`feature_map` (B, D, h, w), the patch tokens."""
    return {"feature_map": run.output.feature_map_BChw}
