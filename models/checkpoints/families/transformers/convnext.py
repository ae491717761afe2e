"""transformers' ConvNeXt and ConvNeXt V2, and DINOv3 with a ConvNeXt."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.convnext import convnext_checkpoint
from models.checkpoints.families.known import Known, number
from models.checkpoints.families.transformers.configuration import (
    NAME,
    Converter,
    require,
    split,
)
from models.checkpoints.families.transformers.names import Names, renamed
from models.inputs.transforms import Preprocess

NAMES: Names = (
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^encoder\.stages\.(\d)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"^encoder\.stages\.(\d)\.layers\.", r"stages.\1."),
    (r"\.layernorm\.", ".norm."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"\.grn\.weight$", ".grn.gamma"),
    (r"\.grn\.bias$", ".grn.beta"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
DINOV3: Names = (
    (r"^(?:model\.)?stages\.(\d)\.downsample_layers\.", r"downsample_layers.\1."),
    (r"^(?:model\.)?stages\.(\d)\.layers\.", r"stages.\1."),
    (r"\.depthwise_conv\.", ".dwconv."),
    (r"\.layer_norm\.", ".norm."),
    (r"\.pointwise_conv(\d)\.", r".pwconv\1."),
    (r"^layer_norm\.", "norm."),
)
DEFAULTS = {"depths": [3, 3, 9, 3]}


def _convnext(
    container: Container, config: Mapping[str, Any], preprocess: Preprocess
) -> Checkpoint:
    kept, dropped = split(container.tensors, f"{config['model_type']}.", ())
    known = Known({"img_size": list(preprocess.input_size)})
    checkpoint = convnext_checkpoint(NAME, renamed(kept, NAMES), known, dropped)
    require(
        {**DEFAULTS, **config},
        hidden_act="gelu",
        num_channels=3,
        num_stages=4,
        depths=checkpoint.arguments["depths"],
    )
    # that of the final norm; the others have a fixed one
    eps = number("layer_norm_eps", config.get("layer_norm_eps", 1e-12))
    return replace(checkpoint, arguments={**checkpoint.arguments, "head_norm_eps": eps})


def _dinov3(container: Container, config: Mapping[str, Any], preprocess: Preprocess) -> Checkpoint:
    known = Known({"img_size": list(preprocess.input_size)})
    checkpoint = convnext_checkpoint(NAME, renamed(container.tensors, DINOV3), known)
    require(
        {**DEFAULTS, **config},
        hidden_act="gelu",
        num_channels=3,
        depths=checkpoint.arguments["depths"],
        layer_norm_eps=1e-6,
    )
    return checkpoint


CONVERTERS: dict[str, Converter] = {
    "convnext": _convnext,
    "convnextv2": _convnext,
    "dinov3_convnext": _dinov3,
}
