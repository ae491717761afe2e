"""transformers' MobileNetV2."""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.known import flag, number
from models.checkpoints.families.transformers.configuration import (
    NAME,
    Converter,
    require,
    split,
)
from models.checkpoints.families.transformers.names import Names, renamed
from models.inputs.transforms import Preprocess

# Blocks by timm's stage, after the first, whose only block is transformers' stem.
DEPTHS = (2, 3, 4, 3, 3, 1)
PLACES = [(stage, block) for stage, depth in enumerate(DEPTHS, 1) for block in range(depth)]
NAMES: Names = (
    (r"^conv_stem\.first_conv\.convolution\.", "conv_stem."),
    (r"^conv_stem\.first_conv\.normalization\.", "bn1."),
    (r"^conv_stem\.conv_3x3\.convolution\.", "blocks.0.0.conv_dw."),
    (r"^conv_stem\.conv_3x3\.normalization\.", "blocks.0.0.bn1."),
    (r"^conv_stem\.reduce_1x1\.convolution\.", "blocks.0.0.conv_pw."),
    (r"^conv_stem\.reduce_1x1\.normalization\.", "blocks.0.0.bn2."),
    *((rf"^layer\.{n}\.", f"blocks.{stage}.{block}.") for n, (stage, block) in enumerate(PLACES)),
    (r"\.expand_1x1\.convolution\.", ".conv_pw."),
    (r"\.expand_1x1\.normalization\.", ".bn1."),
    (r"\.conv_3x3\.convolution\.", ".conv_dw."),
    (r"\.conv_3x3\.normalization\.", ".bn2."),
    (r"\.reduce_1x1\.convolution\.", ".conv_pwl."),
    (r"\.reduce_1x1\.normalization\.", ".bn3."),
    (r"^conv_1x1\.convolution\.", "conv_head."),
    (r"^conv_1x1\.normalization\.", "bn2."),
)


def _mobilenet(
    container: Container, config: Mapping[str, Any], preprocess: Preprocess
) -> Checkpoint:
    kept, dropped = split(container.tensors, "mobilenet_v2.", ())
    require(
        config,
        num_channels=3,
        hidden_act="relu6",
        expand_ratio=6,
        output_stride=32,
        first_layer_is_expansion=True,
        finegrained_output=True,
        depth_divisible_by=8,
        min_depth=8,
    )
    width = number("depth_multiplier", config.get("depth_multiplier", 1.0))
    head = kept.get("classifier.weight")
    return Checkpoint(
        format=NAME,
        architecture=f"mobilenetv2_{round(100 * width):03}",
        arguments={
            "num_classes": 0 if head is None else len(head),
            "pad_type": "same" if flag("tf_padding", config.get("tf_padding", True)) else "",
            "bn_eps": number("layer_norm_eps", config.get("layer_norm_eps", 1e-3)),
        },
        state_dict=renamed(kept, NAMES),
        dropped=dropped,
    )


CONVERTERS: dict[str, Converter] = {"mobilenet_v2": _mobilenet}
