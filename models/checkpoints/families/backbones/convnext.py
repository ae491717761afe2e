"""ConvNeXt (arXiv 2201.03545) and V2 (arXiv 2301.00808): of their authors, and of mmpretrain, whose
backbone mmsegmentation uses."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.checkpoints.families.backbones import Backbone
from models.checkpoints.families.convnext import in_timms_names
from models.checkpoints.families.segmentors import Table

TYPES = ("ConvNeXt", "ConvNeXtV2")
RENAMED = (("depthwise_conv", "dwconv"), ("pointwise_conv", "pwconv"))


def matches(tensors: Mapping[str, Tensor]) -> bool:
    return "downsample_layers.0.0.weight" in tensors


def convert(tensors: Mapping[str, Tensor], table: Table, by_mmseg: bool) -> Backbone:
    """Everything is in the shapes.

    Raises:
        CheckpointError: layer norms have another epsilon than all that are published.
    """
    table.only("gap_before_final_norm", False)
    table.only_eps("norm_cfg", 1e-6)
    table.only("act_cfg", "GELU")
    levels = {f"levels.{k}": v for k, v in tensors.items() if k.startswith("norm")}
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.startswith("norm"):
            continue
        for theirs, ours in RENAMED:
            key = key.replace(theirs, ours)
        state[in_timms_names(key)] = value.flatten() if ".grn." in key else value
    depths, dims = [], []
    for stage in range(4):
        blocks = {k.split(".")[3] for k in state if k.startswith(f"stages.{stage}.blocks.")}
        depths.append(len(blocks))
        dims.append(state[f"stages.{stage}.blocks.0.conv_dw.weight"].shape[0])
    layers = sorted({int(key.split(".")[1].removeprefix("norm")) for key in levels})
    # the last level's norm is also the trunk's; without one only embeddings use it
    state["norm_pre.weight"] = levels.get("levels.norm3.weight", torch.ones(dims[3]))
    state["norm_pre.bias"] = levels.get("levels.norm3.bias", torch.zeros(dims[3]))
    return Backbone(
        architecture="convnext",
        arguments={
            "depths": depths,
            "dims": dims,
            "use_grn": "stages.0.blocks.0.mlp.grn.weight" in state,
            "ls_init_value": 1.0 if "stages.0.blocks.0.gamma" in state else None,
            "head_norm_first": True,
            "num_classes": 0,
        },
        state_dict=state,
        layers=layers,
        dims=[dims[layer] for layer in layers],
        levels=levels,
    )
