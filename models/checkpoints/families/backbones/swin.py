"""Swin (arXiv 2103.14030): of its authors' segmentation code, and mmsegmentation's own."""

from collections.abc import Mapping

import torch
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor

from models.checkpoints.families.backbones import Backbone, grid_of, norm_eps
from models.checkpoints.families.ratios import mlp_ratio
from models.checkpoints.families.segmentors import Table
from models.checkpoints.families.swin import BUFFERS, MARK
from models.errors import CheckpointError

TYPES = ("SwinTransformer",)
INDEX = "relative_position_index"
POSITIONS = "absolute_pos_embed"


def matches(tensors: Mapping[str, Tensor]) -> bool:
    return {MARK, "patch_embed.proj.weight"} <= tensors.keys()


def convert(tensors: Mapping[str, Tensor], table: Table, by_mmseg: bool) -> Backbone:
    """`table`: `norm_cfg`, and `pretrain_img_size` of mmsegmentation's absolute positions;
    everything else is in the shapes.

    Raises:
        CheckpointError: windows that are not square.
    """
    table.only("qk_scale", None)
    table.only("act_cfg", "GELU")
    table.only("strides", [4, 2, 2, 2], (4, 2, 2, 2))
    rows, _ = tensors[MARK].shape
    window = round((rows**0.5 + 1) / 2)
    if (2 * window - 1) ** 2 != rows:
        raise CheckpointError(f"{rows} rows of relative positions are not those of a square window")
    standard = get_relative_position_index(window, window)
    state: dict[str, Tensor] = {}
    levels: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.endswith(BUFFERS):
            if key.endswith(INDEX) and not torch.equal(value, standard):
                raise CheckpointError(f"{key} is not Swin's order of relative positions")
        elif key.startswith("norm"):
            levels[f"levels.{key}"] = value
        elif ".downsample." in key:  # ends a stage in upstream's names, begins one in ours
            stage, _, rest = key.removeprefix("layers.").partition(".")
            merged = _unfolded(value) if by_mmseg and value.shape[-1] % 4 == 0 else value
            state[f"layers.{int(stage) + 1}.{rest}"] = merged
        else:
            state[key] = value
    stages = sorted({int(key.split(".")[1]) for key in state if key.startswith("layers.")})
    depths = [
        len({k.split(".")[3] for k in state if k.startswith(f"layers.{stage}.blocks.")})
        for stage in stages
    ]
    tables = [state[MARK.replace("layers.0", f"layers.{stage}")] for stage in stages]
    dim, _, patch, _ = state["patch_embed.proj.weight"].shape
    layers = sorted({int(key.split(".")[1].removeprefix("norm")) for key in levels})
    last = dim * 2 ** stages[-1]
    norm = f"levels.norm{stages[-1]}"
    # where no head reads the last stage, only embeddings use this norm
    state["norm.weight"] = levels.get(f"{norm}.weight", torch.ones(last))
    state["norm.bias"] = levels.get(f"{norm}.bias", torch.zeros(last))
    eps = norm_eps(table, 1e-5)
    positions, only_size = tensors.get(POSITIONS), None
    if positions is not None and positions.dim() == 3:  # mmsegmentation's, which has no rule
        grid = grid_of(table, positions.shape[1], patch, "pretrain_img_size")
        only_size = grid[0] * patch, grid[1] * patch
    return Backbone(
        architecture="padded-swin",
        arguments={
            "patch_size": patch,
            "embed_dim": dim,
            "depths": depths,
            "num_heads": [each.shape[1] for each in tables],
            "window_size": window,
            "mlp_ratio": mlp_ratio(len(state["layers.0.blocks.0.mlp.fc1.weight"]), dim),
            "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state,
            "patch_norm": "patch_embed.norm.weight" in state,
            "norm_eps": eps,
            "positions": [] if positions is None else list(positions.shape),
        },
        state_dict=state,
        layers=layers,
        dims=[dim * 2**layer for layer in layers],
        window=only_size,
        levels=levels,
        settings={"levels_norm_eps": eps},
        dropped=tuple(key for key in tensors if key.endswith(BUFFERS)),
    )


def _unfolded(weight: Tensor) -> Tensor:
    """A weight over four merged patches, ordered (channel, row, column), as upstream orders them:
    (column, row, channel)."""
    split = torch.unflatten(weight, -1, (-1, 2, 2))
    return split.movedim((-3, -2, -1), (-1, -2, -3)).flatten(-3)
