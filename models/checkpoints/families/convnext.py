"""ConvNeXt (arXiv 2201.03545) and V2 (arXiv 2301.00808): timm's arguments from the shapes."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.families.known import Known, flag, number
from models.inputs.transforms import Preprocess
from models.networks import OWN
from models.reference_outputs import ReferenceRun

STATISTICS = "imagenet_default_mean_and_std"
HALF = (0.5, 0.5, 0.5)
RENAMED = (
    (".dwconv.", ".conv_dw."),
    (".pwconv1.", ".mlp.fc1."),
    (".pwconv2.", ".mlp.fc2."),
    (".grn.gamma", ".mlp.grn.weight"),
    (".grn.beta", ".mlp.grn.bias"),
)


def convnext_checkpoint(
    name: str, tensors: Mapping[str, Tensor], known: Known, dropped: tuple[str, ...] = ()
) -> Checkpoint:
    """A ConvNeXt in upstream's names, of either version, as a checkpoint of format `name`.

    A backbone without `norm` gets a norm's initial values, as upstream's fine-tuning does.

    Args:
        known: `img_size` in pixels, one side or both (224, assumed). From 384 pixels on, images are
            resized to it without crop, as upstream evaluates them.
        dropped: keys that only training used.
    """
    named = {in_timms_names(key): value for key, value in tensors.items()}
    for key in list(named):
        if ".grn." in key:
            named[key] = named[key].flatten()
    depths, dims = [], []
    for stage in range(4):
        blocks = {k.split(".")[3] for k in named if k.startswith(f"stages.{stage}.blocks.")}
        depths.append(len(blocks))
        dims.append(named[f"stages.{stage}.blocks.0.conv_dw.weight"].shape[0])
    if "head.norm.weight" not in named:
        named["head.norm.weight"], named["head.norm.bias"] = (
            torch.ones(dims[3]),
            torch.zeros(dims[3]),
        )
    head = named.get("head.fc.weight")
    return Checkpoint(
        format=name,
        architecture="convnext",
        library=OWN,
        arguments={
            "depths": depths,
            "dims": dims,
            "use_grn": "stages.0.blocks.0.mlp.grn.weight" in named,
            "ls_init_value": 1e-6 if "stages.0.blocks.0.gamma" in named else None,
            "num_classes": 0 if head is None else head.shape[0],
        },
        state_dict=named,
        preprocess=convnext_preprocess(known),
        dropped=dropped,
        assumed=known.assumed,
    )


def convnext_preprocess(known: Known) -> Preprocess:
    """Upstream's evaluation transform for `img_size`.

    Args:
        known: also `crop_pct` (0.875) and `imagenet_default_mean_and_std` (true), whether pixels
            are normalised by ImageNet's statistics instead of being scaled to -1..1; the training
            script states both.
    """
    size = known.image_size()
    preprocess = Preprocess(input_size=size)
    if (by_imagenet := known.find(STATISTICS)) is not None and not flag(STATISTICS, by_imagenet):
        preprocess = replace(preprocess, mean=HALF, std=HALF)
    if size[0] >= 384:
        return replace(preprocess, crop_mode="squash", crop_pct=1.0)
    crop = known.find("crop_pct")
    return preprocess if crop is None else replace(preprocess, crop_pct=number("crop_pct", crop))


def convnext_outputs(run: ReferenceRun) -> dict[str, Tensor]:
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


def in_timms_names(key: str) -> str:
    """timm's name for a key of upstream's ConvNeXt."""
    parts = key.split(".")
    match parts[0]:
        case "downsample_layers":
            stage, rest = parts[1], ".".join(parts[2:])
            return f"stem.{rest}" if stage == "0" else f"stages.{stage}.downsample.{rest}"
        case "stages":
            return renamed(f"stages.{parts[1]}.blocks." + ".".join(parts[2:]))
        case "norm":
            return ".".join(("head.norm", *parts[1:]))
        case "head":
            return ".".join(("head.fc", *parts[1:]))
    return key


def renamed(key: str) -> str:
    """timm's name for a key of a block."""
    for theirs, ours in RENAMED:
        key = key.replace(theirs, ours)
    return key
