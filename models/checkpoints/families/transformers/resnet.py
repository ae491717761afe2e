"""transformers' ResNets."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.known import Known
from models.checkpoints.families.resnet import resnet_checkpoint
from models.checkpoints.families.transformers.configuration import (
    NAME,
    Converter,
    require,
    split,
)
from models.checkpoints.families.transformers.names import Names, renamed
from models.inputs.transforms import Preprocess

# Layers of a block and stages are counted from 1 in torchvision's names.
NAMES: Names = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    *((rf"^encoder\.stages\.{n}\.layers\.", f"layer{n + 1}.") for n in range(4)),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    *((rf"\.layer\.{n}\.convolution\.", f".conv{n + 1}.") for n in range(3)),
    *((rf"\.layer\.{n}\.normalization\.", f".bn{n + 1}.") for n in range(3)),
    (r"^classifier\.1\.", "fc."),
)
DEFAULTS = {"depths": [3, 4, 6, 3]}


def _resnet(container: Container, config: Mapping[str, Any], preprocess: Preprocess) -> Checkpoint:
    kept, dropped = split(container.tensors, "resnet.", ())
    known = Known({"img_size": list(preprocess.input_size)})
    checkpoint = resnet_checkpoint(NAME, renamed(kept, NAMES), known, dropped=dropped)
    basic = config.get("layer_type") == "basic"
    require(
        {**DEFAULTS, **config},
        num_channels=3,
        hidden_act="relu",
        layer_type="basic" if basic else "bottleneck",
        downsample_in_bottleneck=False,
        downsample_in_first_stage=False,
        depths=checkpoint.arguments["layers"],
    )
    return replace(checkpoint, architecture="resnet-basic") if basic else checkpoint


CONVERTERS: dict[str, Converter] = {"resnet": _resnet}
