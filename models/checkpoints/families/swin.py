"""What a Swin's state dict, as the self-supervised codes keep it, says of its architecture."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
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
    **built: Any,
) -> Checkpoint:
    """A Swin as a checkpoint of format `name`. What merges patches belongs to the end of a stage
    there, and to the beginning of the next one in timm.

    Raises:
        CheckpointError: not a whole Swin.
    """
    if MARK not in tensors or "patch_embed.proj.weight" not in tensors:
        raise CheckpointError(f"not a whole Swin: {MARK} or patch_embed missing")
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
    size = int(arguments.get("img_size", 224))
    told = {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": dim,
        "depths": depths,
        "num_heads": [tensors[tables.format(stage)].shape[1] for stage in sorted(stages)],
        "window_size": int(arguments.get("window_size", (max(rows) ** 0.5 + 1) / 2)),
        "mlp_ratio": tensors["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "num_classes": 0 if head is None else head.shape[0],
        **built,
    }
    return Checkpoint(
        format=name,
        architecture="swin",
        library=OWN,
        arguments=told,
        state_dict=named,
        preprocess=replace(preprocess or Preprocess(), input_size=(size, size)),
        dropped=dropped,
    )


def swin_outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """Tokens row by row, the last block's `attention`, and `linear_features`: the means of the last
    four blocks' outputs, oldest first."""
    network = run.network
    assert isinstance(network, Swin)
    outputs, given = network.block_outputs(run.inputs["pixel_values"])
    return {
        "tokens": run.output.tokens_BTD,
        "feature_map": run.output.feature_map_BChw,
        "attention": network.last_attention(given),
        "linear_features": torch.cat([block.mean((1, 2)) for block in outputs[-4:]], -1),
    }
