"""Decoders: maps of a trunk's blocks or stages to logits. One module per family of heads.

A module has `TYPES`, mmsegmentation's names for its heads; `MARK`, a tensor that only its heads
have (FCN's is in every head that ends in a convolution, and counts last); and
`create(tensors, inputs, settings)`, the head without its weights. Necks are in `necks.py`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.segmentation.decoders import dpt, fcn, fpn, segmenter, setr, uper
from models.segmentation.decoders.layers import use_group_norms
from models.segmentation.decoders.necks import (
    BeitNeck,
    LevelNorms,
    SelectLevels,
    Steps,
    TinyMimNeck,
    check_plain,
    create_neck,
)

HEADS: tuple[Any, ...] = (uper, fpn, setr, segmenter, dpt, fcn)
HEAD_TYPES = tuple(name for module in HEADS for name in module.TYPES)
HEAD = "decode_head."
# Most maps that a decoder reads, and channels of one.
MAX_MAPS, MAX_CHANNELS = 64, 65_536
CLASSES = ("decode_head.conv_seg.weight", "decode_head.mask_norm.weight")


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, under their names without it."""
    return {k.removeprefix(prefix): value for k, value in tensors.items() if k.startswith(prefix)}


def class_count(tensors: Mapping[str, Tensor]) -> int:
    """The classes of a decoder with these tensors.

    Raises:
        KeyError: none of them tells.
    """
    name = next((name for name in CLASSES if name in tensors), CLASSES[0])
    return tensors[name].shape[0]


def create_decoder(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> nn.Module:
    """A decoder without its weights, from the names and shapes of its tensors.

    Args:
        tensors: `levels.*` (a `BeitNeck`, `TinyMimNeck` or `LevelNorms`, optional), `neck.*`
            (optional) and `decode_head.*`.
        settings: `inputs`, the channels of each map; `patch`, the patch size, for a `BeitNeck`;
            `levels_norm_eps` of `LevelNorms` (1e-6); `in_index`, the levels that the head reads
            (all); `neck_groups` and `decode_head_groups`, of group norms in place of batch norms;
            and those of `create_neck` and of the heads.

    Raises:
        KeyError: a tensor or a setting is missing.
        ValueError: a setting is out of range.
    """
    inputs = [int(n) for n in settings["inputs"][: MAX_MAPS + 1]]
    if not 1 <= len(inputs) <= MAX_MAPS or not all(1 <= n <= MAX_CHANNELS for n in inputs):
        raise ValueError(f"inputs must be up to {MAX_MAPS} numbers from 1 to {MAX_CHANNELS}")
    steps: dict[str, nn.Module] = {}
    levels = below(tensors, "levels.")
    if any(key.startswith("fpn1.") for key in levels):
        check_plain(inputs)
    if (added := levels.get("conv1x1.1.weight")) is not None:
        steps["levels"] = TinyMimNeck(inputs[0], added.shape[0])
        inputs = [4 * inputs[0]] * 4
    elif any(key.startswith("fpn1.") for key in levels):
        steps["levels"] = BeitNeck(inputs[0], int(settings["patch"]))
    elif levels:
        numbers = sorted({int(key.partition(".")[0].removeprefix("norm")) for key in levels})
        steps["levels"] = LevelNorms(inputs, numbers, float(settings.get("levels_norm_eps", 1e-6)))
    if (made := create_neck(below(tensors, "neck."), inputs, settings)) is not None:
        steps["neck"], inputs = made
    selected = [int(n) for n in settings.get("in_index", range(len(inputs)))[: MAX_MAPS + 1]]
    if len(selected) > MAX_MAPS:
        raise ValueError(f"in_index can have up to {MAX_MAPS} levels")
    if selected != list(range(len(inputs))):
        steps["selected"] = SelectLevels(selected)
        inputs = [inputs[level] for level in selected]
    head = below(tensors, HEAD)
    family = next((module for module in HEADS if module.MARK in head), None)
    if family is None:
        raise ValueError(f"no head has tensors named {', '.join(list(head)[:5])}")
    steps["decode_head"] = family.create(head, inputs, settings)
    for name in ("neck", "decode_head"):
        if name in steps and f"{name}_groups" in settings:
            use_group_norms(steps[name], int(settings[f"{name}_groups"]))
    return Steps(steps)
