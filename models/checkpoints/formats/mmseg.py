"""mmsegmentation's checkpoints (github.com/open-mmlab/mmsegmentation): a backbone and a decoder.

`meta` holds the configuration as text, and the classes' names and colours. Backbones are BEiT
(arXiv 2106.08254), with or without its tables of relative positions, as BEiT, MAE, TinyMIM and
others publish for ADE20K; and ConvNeXt V1 and V2 (arXiv 2201.03545, 2301.00808).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.beit import beit_checkpoint
from models.checkpoints.families.configuration import read_configuration
from models.checkpoints.families.vit import split_prefix
from models.checkpoints.formats.convnext_v2 import in_timms_names
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

NAME = "mmsegmentation"
SCALE = (2048, 512)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    if "decode_head.conv_seg.weight" not in keys:
        return None
    for key, what in (("backbone.blocks.0.norm1.weight", "a plain ViT's or BEiT's blocks"),
                      ("backbone.downsample_layers.0.0.weight", "ConvNeXt's stages")):  # fmt: skip
        if key in keys:
            return f"backbone with {what}, and decode_head with conv_seg"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `backbone`, `decode_head` and `test_cfg`, tables of an mmsegmentation
    configuration; the file's own configuration has the defaults.

    Raises:
        CheckpointError: the decoder resizes with aligned corners.
    """
    meta = container.beside.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    config = read_configuration(str(meta.get("config", "")))
    model_config = {**config.get("model", {}), **_tables(arguments)}
    backbone, rest = split_prefix(container.tensors, "backbone.")
    tensors = {
        key: container.tensors[key] for key in rest if key.startswith(("decode_head.", "neck."))
    }
    dropped = tuple(key for key in rest if key not in tensors)
    settings = _labels(meta, tensors["decode_head.conv_seg.weight"].shape[0])
    head = dict(model_config.get("decode_head", {}))
    settings["pool_scales"] = list(head.get("pool_scales", (1, 2, 3, 6)))
    if isinstance(head.get("in_index"), list | tuple):
        settings["in_index"] = [int(n) for n in head["in_index"]]
    if head.get("align_corners"):
        raise CheckpointError("decode_head has align_corners = true; only false is supported")
    if "blocks.0.norm1.weight" in backbone:
        checkpoint, levels, window = _beit(container, backbone, model_config, settings)
    else:
        checkpoint, levels, window = _convnext(backbone, settings)
    settings["windows"] = _windows(config, model_config.get("test_cfg", {}), window)
    state = HeadState({**levels, **tensors}, settings)
    return Checkpoint(
        format=NAME,
        architecture=checkpoint.architecture,
        library=OWN,
        arguments=checkpoint.arguments,
        state_dict=checkpoint.state_dict,
        heads={"semantic": state},
        preprocess=_preprocess(config, checkpoint),
        dropped=(*checkpoint.dropped, *dropped),
        assumed={} if model_config else {"layers": settings["layers"]},
    )


def _tables(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a configuration among the arguments."""
    names = ("backbone", "decode_head", "test_cfg")
    return {n: arguments[n] for n in names if isinstance(arguments.get(n), Mapping)}


def _labels(meta: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """`labels` and `palette`: the file's, ADE20K's for 150 classes, or numbers."""
    names, palette = meta.get("CLASSES"), meta.get("PALETTE")
    if isinstance(names, list) and len(names) == classes:
        settings: dict[str, Any] = {"labels": [str(name) for name in names]}
        if isinstance(palette, list) and len(palette) == classes:
            settings["palette"] = palette
        return settings
    if classes == 150:
        return {"labels": "ade20k-150"}
    return {"labels": [str(number) for number in range(classes)]}


def _beit(
    container: Container,
    backbone: Mapping[str, Tensor],
    config: Mapping[str, Any],
    settings: dict[str, Any],
) -> tuple[Checkpoint, dict[str, Tensor], int | None]:
    """The backbone, the decoder's levels, and the side of its windows; extends `settings`."""
    network = {k: v for k, v in backbone.items() if not k.startswith(("fpn", "norm."))}
    dim = network["patch_embed.proj.weight"].shape[0]
    # only embeddings use this norm; its values are those that fine-tuning starts from
    network["fc_norm.weight"], network["fc_norm.bias"] = torch.ones(dim), torch.zeros(dim)
    backbone_config = dict(config.get("backbone", {}))
    checkpoint = beit_checkpoint(NAME, container, network, backbone_config, global_pool="avg")
    depth = checkpoint.arguments["depth"]
    default = range(depth // 4 - 1, depth, depth // 4) if depth >= 4 else range(depth)
    settings["layers"] = list(backbone_config.get("out_indices", default))
    settings["inputs"] = [dim] * len(settings["layers"])
    settings["patch"] = checkpoint.arguments["patch_size"]
    levels = {f"levels.{k}": v for k, v in backbone.items() if k.startswith("fpn")}
    return checkpoint, levels, checkpoint.arguments["img_size"]


def _convnext(
    backbone: Mapping[str, Tensor], settings: dict[str, Any]
) -> tuple[Checkpoint, dict[str, Tensor], int | None]:
    """As `_beit`; windows may have any side."""
    levels = {f"levels.{k}": v for k, v in backbone.items() if k.startswith("norm")}
    named = {in_timms_names(k): v for k, v in backbone.items() if not k.startswith("norm")}
    for name in ("weight", "bias"):  # the last level's norm is also the trunk's
        named[f"norm_pre.{name}"] = backbone[f"norm3.{name}"]
    depths, dims = [], []
    for stage in range(4):
        blocks = {k.split(".")[3] for k in named if k.startswith(f"stages.{stage}.blocks.")}
        depths.append(len(blocks))
        dims.append(named[f"stages.{stage}.blocks.0.conv_dw.weight"].shape[0])
    is_v2 = "stages.0.blocks.0.mlp.grn.weight" in named
    for key in list(named):
        if ".grn." in key:
            named[key] = named[key].flatten()
    settings["layers"] = [0, 1, 2, 3]
    settings["inputs"] = dims
    checkpoint = Checkpoint(
        format=NAME,
        architecture="convnext",
        library=OWN,
        arguments={
            "depths": depths,
            "dims": dims,
            "use_grn": is_v2,
            "ls_init_value": 1.0 if "stages.0.blocks.0.gamma" in named else None,
            "head_norm_first": True,
            "num_classes": 0,
        },
        state_dict=named,
    )
    return checkpoint, levels, None


def _windows(
    config: Mapping[str, Any], test: Mapping[str, Any], window: int | None
) -> dict[str, Any]:
    """Sliding windows: `window` for trunks of one input size, else the test configuration's."""
    windows: dict[str, Any] = {"scale": _scale(config, window)}
    crop = test.get("crop_size") or ((window, window) if window else None)
    if crop is None or (test.get("mode") != "slide" and window is None):
        return windows
    windows["crop"] = [window, window] if window else [int(n) for n in crop]
    default = [side * 2 // 3 for side in windows["crop"]]
    windows["stride"] = [int(n) for n in test.get("stride", default)]
    return windows


def _scale(config: Mapping[str, Any], window: int | None) -> list[int]:
    """The test pipeline's (longer, shorter) image side; else four windows by one, or SCALE."""
    for step in config.get("test_pipeline", ()):
        scale = step.get("img_scale", step.get("scale")) if isinstance(step, dict) else None
        if isinstance(scale, Sequence) and len(scale) == 2 and all(scale):
            return [int(n) for n in scale]
    return [4 * window, window] if window else list(SCALE)


def _preprocess(config: Mapping[str, Any], checkpoint: Checkpoint) -> Preprocess:
    """The transform for other tasks than segmentation: squashed to the size of a window."""
    size = checkpoint.arguments.get("img_size", min(SCALE))
    norm = config.get("img_norm_cfg", {})
    default = Preprocess()

    def triple(name: str, otherwise: tuple[float, float, float]) -> tuple[float, float, float]:
        values = norm.get(name)
        if not isinstance(values, Sequence) or len(values) != 3:
            return otherwise
        first, second, third = (float(value) / 255 for value in values)
        return first, second, third

    return Preprocess(
        input_size=(size, size),
        crop_mode="squash",
        crop_pct=1.0,
        interpolation="bilinear",
        mean=triple("mean", default.mean),
        std=triple("std", default.std),
    )
