"""Swin (arXiv 2103.14030) as self-supervised methods store it, in timm's names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.families.known import Known, whole
from models.checkpoints.families.ratios import mlp_ratio
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN
from models.networks.swin import Swin
from models.reference_outputs import ReferenceRun

MARK = "layers.0.blocks.0.attn.relative_position_bias_table"
BUFFERS = ("relative_position_index", "attn_mask")


def swin_checkpoint(
    name: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    preprocess: Preprocess | None = None,
    dropped: tuple[str, ...] = (),
    img_size: int = 224,
    **built: Any,
) -> Checkpoint:
    """A Swin as a checkpoint of format `name`.

    Patch merging ends a stage in upstream's names, and begins the next stage in timm's.

    Args:
        arguments: `img_size`, one side in pixels, and `window_size` (from the tables of relative
            positions). Without `img_size` the size is that of the last stage's map, if its window
            is smaller than others and so is the map.
        preprocess: everything but the input size.
        dropped: keys that only training used.
        img_size: the size without `img_size`, which is then reported as assumed.
        built: arguments of the network that no shape determines.

    Raises:
        CheckpointError: the first table of relative positions or the patch embedding is missing.
    """
    if MARK not in tensors or "patch_embed.proj.weight" not in tensors:
        raise CheckpointError(f"not a complete Swin: {MARK} or patch_embed.proj.weight is missing")
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.endswith(BUFFERS):
            dropped = (*dropped, key)
            continue
        if ".downsample." in key:
            stage, _, rest = key.removeprefix("layers.").partition(".")
            key = f"layers.{int(stage) + 1}.{rest}"
        named[{"head.weight": "head.fc.weight", "head.bias": "head.fc.bias"}.get(key, key)] = value
    stages = {int(key.split(".")[1]) for key in tensors if key.startswith("layers.")}
    tables = "layers.{}.blocks.0.attn.relative_position_bias_table"
    blocks = "layers.{}.blocks."
    depths = [
        len({key.split(".")[3] for key in tensors if key.startswith(blocks.format(stage))})
        for stage in sorted(stages)
    ]
    rows = [tensors[tables.format(stage)].shape[0] for stage in sorted(stages)]
    dim, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    head = tensors.get("head.weight")
    known = Known(arguments)
    window = whole("window_size", arguments.get("window_size", (max(rows) ** 0.5 + 1) / 2))
    smallest = round((rows[-1] ** 0.5 + 1) / 2)
    if smallest < window and known.find("img_size") is None:
        size = smallest * patch * 2 ** (len(rows) - 1)
    else:
        size = whole("img_size", known.get("img_size", img_size))
    network = {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": dim,
        "depths": depths,
        "num_heads": [tensors[tables.format(stage)].shape[1] for stage in sorted(stages)],
        "window_size": window,
        "mlp_ratio": mlp_ratio(len(tensors["layers.0.blocks.0.mlp.fc1.weight"]), dim),
        "num_classes": 0 if head is None else head.shape[0],
        **built,
    }
    return Checkpoint(
        format=name,
        architecture="swin",
        library=OWN,
        arguments=network,
        state_dict=named,
        preprocess=replace(preprocess or Preprocess(), input_size=(size, size)),
        dropped=dropped,
        assumed=known.assumed,
    )


def block_outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """Those of a Swin; of other hierarchical networks all of them but `attention`, of a ResNet
    `feature_map` alone."""
    if isinstance(run.network, Swin):
        return swin_outputs(run)
    named = {"feature_map": run.output.feature_map_BChw}
    if hasattr(run.network, "block_means"):
        means = run.network.block_means(run.inputs["pixel_values"])
        named |= {"tokens": run.output.tokens_BTD, "linear_features": torch.cat(means[-4:], -1)}
    return named


def swin_outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`tokens` (B, h * w, D) row by row, `feature_map` (B, D, h, w), the last block's `attention`,
    and `linear_features`: the means of the last four blocks' outputs, in the order of the blocks.
    """
    network = run.network
    assert isinstance(network, Swin)
    outputs, last_input = network.block_outputs(run.inputs["pixel_values"])
    return {
        "tokens": run.output.tokens_BTD,
        "feature_map": run.output.feature_map_BChw,
        "attention": network.last_attention(last_input),
        "linear_features": torch.cat([block.mean((1, 2)) for block in outputs[-4:]], -1),
    }
