"""ConvNeXt V2 (arXiv 2301.00808, github.com/facebookresearch/ConvNeXt-V2).

Classifiers, the published FCMAE backbones, and checkpoints of FCMAE's training script, whose sparse
convolutions are converted to dense ones. `model` is served, as upstream evaluates it;
`weights="model_ema"` selects the exponential average.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.vit import choose_weights
from models.inputs.transforms import Preprocess
from models.networks import OWN
from models.reference_outputs import ReferenceRun

NAME = "convnext-v2"
SPARSE = "encoder.stages.0.0.dwconv.kernel"
PRETRAINING = ("proj.", "mask_token", "decoder.", "pred.")
RENAMED = (
    (".dwconv.", ".conv_dw."),
    (".pwconv1.", ".mlp.fc1."),
    (".pwconv2.", ".mlp.fc2."),
    (".grn.gamma", ".mlp.grn.weight"),
    (".grn.beta", ".mlp.grn.bias"),
)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if SPARSE in keys:
        return "sparse convolutions under encoder, as FCMAE's script saves them"
    if "stages.0.0.grn.gamma" in keys and "downsample_layers.0.0.weight" in keys:
        return "downsample_layers, and stages with grn"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `weights` (`model`), `img_size` in pixels, one side or both (224)."""
    weights = choose_weights(container, arguments, "model")
    dense = _dense(weights)
    named = {in_timms_names(key): value for key, value in dense.items()}
    for key in list(named):
        if ".grn." in key:
            named[key] = named[key].flatten()
    depths, dims = [], []
    for stage in range(4):
        blocks = {k.split(".")[3] for k in named if k.startswith(f"stages.{stage}.blocks.")}
        depths.append(len(blocks))
        dims.append(named[f"stages.{stage}.blocks.0.conv_dw.weight"].shape[0])
    head = named.get("head.fc.weight")
    if "head.norm.weight" not in named:  # a backbone alone: the values fine-tuning starts from
        named["head.norm.weight"], named["head.norm.bias"] = (
            torch.ones(dims[3]),
            torch.zeros(dims[3]),
        )
    built = {
        "depths": depths,
        "dims": dims,
        "use_grn": True,
        "ls_init_value": None,
        "num_classes": 0 if head is None else head.shape[0],
    }
    size = arguments.get("img_size", 224)
    rows, columns = (size, size) if isinstance(size, int) else size
    preprocess = Preprocess(input_size=(rows, columns))
    if rows >= 384:
        preprocess = replace(preprocess, crop_mode="squash", crop_pct=1.0)
    return Checkpoint(
        format=NAME,
        architecture="convnext",
        library=OWN,
        arguments=built,
        state_dict=named,
        preprocess=preprocess,
        dropped=tuple(key for key in weights if key.startswith(PRETRAINING)),
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`feature_map_stage1`, the second stage's output, and `embedding` with and without norm."""
    network = run.network
    stages = network.forward_intermediates(
        run.inputs["pixel_values"], indices=[1], intermediates_only=True
    )
    mean = run.output.feature_map_BChw.mean((2, 3))
    return {
        "feature_map_stage1": stages[0],
        "embedding_no_norm": mean,
        "embedding": layer_norm(
            mean, mean.shape[-1:], network.head.norm.weight, network.head.norm.bias, 1e-6
        ),
    }


def _dense(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with dense convolutions, without parts that only pre-training uses.

    Sparse kernels are (k * k, in, out), or (k * k, C) if depthwise, in column-major order.
    """
    dense: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key.startswith(PRETRAINING):
            continue
        name = key.removeprefix("encoder.").replace(".ln.", ".").replace(".linear.", ".")
        if name.endswith(".kernel"):
            name = name.removesuffix("kernel") + "weight"
            side = round(value.shape[0] ** 0.5)
            if value.dim() == 2:
                value = torch.unflatten(value.T, 1, (side, side))[:, None].transpose(2, 3)
            else:
                value = torch.unflatten(value.permute(2, 1, 0), 2, (side, side)).transpose(2, 3)
        elif name.endswith(".bias"):
            value = value.flatten()
        dense[name] = value.contiguous()
    return dense


def in_timms_names(key: str) -> str:
    """timm's name for a key of upstream's ConvNeXt."""
    parts = key.split(".")
    match parts[0]:
        case "downsample_layers":
            stage, rest = parts[1], ".".join(parts[2:])
            return f"stem.{rest}" if stage == "0" else f"stages.{stage}.downsample.{rest}"
        case "stages":
            key = f"stages.{parts[1]}.blocks." + ".".join(parts[2:])
            for theirs, ours in RENAMED:
                key = key.replace(theirs, ours)
            return key
        case "norm":
            return f"head.norm.{parts[1]}"
        case "head":
            return f"head.fc.{parts[1]}"
    return key
