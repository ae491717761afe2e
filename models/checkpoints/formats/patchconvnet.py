"""PatchConvNet (arXiv 2112.13692, github.com/facebookresearch/deit), in DeiT's container.

`model` is served, as upstream evaluates it; `weights="ema"` selects the exponential average.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.heads import assumed
from models.checkpoints.families.known import Known, number, whole
from models.checkpoints.families.ratios import mlp_ratio
from models.checkpoints.families.vit import choose_weights
from models.inputs.transforms import Preprocess
from models.networks import OWN
from models.reference_outputs import ReferenceRun

NAME = "patchconvnet"
MARK = "blocks.0.attn.qkv_pos.4.conv_reduce.weight"


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if MARK in container.tensors and "blocks_token_only.0.attn.q.weight" in container.tensors:
        return "columns with qkv_pos, and blocks_token_only"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights`, `num_heads` (1), `img_size` (224) and `crop_pct` of the evaluation
    (0.875), which the training script's arguments may have."""
    known = Known(arguments, container.script)
    size, crop_pct = (
        known.image_size(),
        number("crop_pct", known.get("crop_pct", 0.875, "eval_crop_ratio")),
    )
    tensors = choose_weights(container, arguments, container.wrapper)
    _, classes, dim = tensors["cls_token"].shape
    only = "blocks_token_only."
    single = tensors.get("head.weight")
    return Checkpoint(
        format=NAME,
        architecture=NAME,
        library=OWN,
        arguments={
            "embed_dim": dim,
            "depth": len({k.split(".")[1] for k in tensors if k.startswith("blocks.")}),
            "depth_token_only": len({k.split(".")[1] for k in tensors if k.startswith(only)}),
            "num_heads": whole("num_heads", arguments.get("num_heads", 1)),
            "mlp_ratio": mlp_ratio(len(tensors[f"{only}0.mlp.fc1.weight"]), dim),
            "num_classes": classes if single is None else single.shape[0],
            "class_tokens": classes,
        },
        state_dict=dict(tensors),
        assumed={**known.assumed, **assumed(arguments, num_heads=1)},
        preprocess=Preprocess(input_size=size, crop_pct=crop_pct),
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """The last pooling's `attention`, `feature_map`, and `embedding`: the class token (B, D), or
    one per class (B, K, D)."""
    network = run.network
    classes = run.output.tokens_BTD[:, : run.output.prefix]
    return {
        "attention": network.last_attention(run.inputs["pixel_values"]),
        "feature_map": run.output.feature_map_BChw,
        "embedding": classes[:, 0] if run.output.prefix == 1 else classes,
    }
