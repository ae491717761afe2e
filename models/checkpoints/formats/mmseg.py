"""mmsegmentation's checkpoints (github.com/open-mmlab/mmsegmentation): a backbone and a decoder.

Backbones are in `families/backbones`, decoders in `models/segmentation/decoders`, and the
configuration that runners of mmcv and mmengine keep in the file in `families/segmentors.py`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.backbones import convert_backbone, in_timms_names
from models.checkpoints.families.known import whole, wholes
from models.checkpoints.families.segmentors import SCALE, Segmentor, Table, read_segmentor
from models.checkpoints.families.vit import split_prefix
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN
from models.segmentation.decoders import HEAD_TYPES, below, class_count

NAME = "mmsegmentation"
KEPT = ("decode_head.", "neck.")
# Pixels between the positions of a pyramid's coarsest map.
STRIDE = 32
# By mmsegmentation's names of Segmenter's decoder, those of its authors.
RENAMED = {
    "dec_proj.": "proj_dec.",
    "patch_proj.weight": "proj_patch",
    "classes_proj.weight": "proj_classes",
}


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = container.tensors.keys()
    for prefix in ("backbone.", "decode_head."):
        if not any(key.startswith(prefix) for key in keys):
            return None
    return "tensors under backbone and decode_head"


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `backbone`, `neck`, `decode_head` and `test_cfg`, tables of an mmsegmentation
    configuration; the file's own configuration has the defaults.

    Raises:
        CheckpointError: a backbone, neck or head that is not supported, or something that neither
            the file nor the arguments say.
    """
    config = read_segmentor(container, arguments)
    if (kind := config.decode_head.type) and kind not in HEAD_TYPES:
        raise CheckpointError(f"decode_head is a {kind}; supported: {', '.join(HEAD_TYPES)}")
    tensors, rest = split_prefix(container.tensors, "backbone.")
    backbone = convert_backbone(tensors, config.backbone)
    head = {k: container.tensors[k] for k in rest if k.startswith(KEPT)}
    head |= backbone.levels
    settings = {
        "layers": list(backbone.layers),
        "inputs": list(backbone.dims),
        **backbone.settings,
        **labels(config, class_count(head)),
        "windows": windows(config, backbone.window, backbone.settings.get("patch", STRIDE)),
    }
    has_groups = any(".gn." in key for key in head)
    head = {k.replace(".gn.", ".bn."): v for k, v in in_segmenters_names(head).items()}
    settings |= decoder_settings(config, head, len(backbone.layers))
    if has_groups and not {"neck_groups", "decode_head_groups"} & settings.keys():
        raise CheckpointError(
            "the file has group norms and does not say their groups; set arguments = {decode_head "
            "= {norm_cfg = {type = 'GN', num_groups = ...}}}: 32 in most code"
        )
    reads_tokens = "readout" in settings
    config.backbone.only("output_cls_token", reads_tokens)
    if reads_tokens:
        if not backbone.arguments.get("class_token"):
            raise CheckpointError("decode_head is a DPTHead, which reads a plain ViT's class token")
        settings |= {"class_tokens": True, "inputs": [2 * dim for dim in backbone.dims]}
    size = backbone.window or backbone.arguments.get("img_size", min(config.scale or SCALE))
    return Checkpoint(
        format=NAME,
        architecture=backbone.architecture,
        library=OWN,
        arguments=backbone.arguments,
        state_dict=backbone.state_dict,
        heads={"semantic": HeadState(head, settings)},
        preprocess=preprocess(config, size),
        dropped=(
            *(f"backbone.{key}" for key in backbone.dropped),
            *(key for key in rest if not key.startswith(KEPT)),
        ),
        assumed=config.assumed,
    )


def labels(config: Segmentor, classes: int) -> dict[str, Any]:
    """`labels` and `palette`: the file's, ADE20K's for 150 classes, or numbers."""
    if len(config.labels) == classes:
        settings: dict[str, Any] = {"labels": list(config.labels)}
        if isinstance(config.palette, list) and len(config.palette) == classes:
            settings["palette"] = config.palette
        return settings
    names = "ade20k-150" if classes == 150 else [str(number) for number in range(classes)]
    config.assumed["labels"] = names if classes == 150 else "numbers"
    return {"labels": names}


def decoder_settings(
    config: Segmentor, tensors: Mapping[str, Tensor], levels: int, *, every: bool = False
) -> dict[str, Any]:
    """What the decoder's shapes do not determine, see `create_decoder`.

    Args:
        tensors: those of the neck and of the head.
        levels: how many maps the backbone returns.
        every: the head reads all of them where its `in_index` is not known.

    Raises:
        CheckpointError: it is not known, or not supported.
    """
    table, neck = config.decode_head, config.neck
    head = below(tensors, "decode_head.")
    table.only("align_corners", False)
    for each in (table, neck):
        each.only("act_cfg", "ReLU")
    if "act_cfg" in table.values and table.find("act_cfg") is None:
        raise CheckpointError("decode_head.act_cfg is None; supported: 'ReLU'")
    neck.only("add_extra_convs", False)
    settings: dict[str, Any] = {}
    for each in (table, neck):
        norm = each.find("norm_cfg")
        if not isinstance(norm, Mapping) or norm.get("type") == "LN":
            continue
        if norm.get("type") not in (None, "BN", "SyncBN", "GN"):
            raise CheckpointError(
                f"{each.name}.norm_cfg is {norm['type']}; supported: BN, SyncBN, GN"
            )
        each.only_eps("norm_cfg", 1e-5)
        if norm.get("type") == "GN":
            settings[f"{each.name}_groups"] = whole("num_groups", norm.get("num_groups"))
    if class_count(tensors) == 1:
        raise CheckpointError(
            "decode_head has one output with a threshold; only classes are supported"
        )
    if any(key.startswith("neck.convs.") for key in tensors):
        scales = neck.require("scales", "[4, 2, 1, 0.5]", [0.5, 1, 2, 4])
        settings["scales"] = [float(n) for n in scales]
        settings["neck_activates"] = neck.get("act_cfg", False) is not False
        levels = len(settings["scales"])
    elif any(key.startswith("neck.mla.") for key in tensors):
        settings["neck_norm_eps"] = _eps(neck, "norm_layer", 1e-6)
        usual = "{type = 'ReLU'} of SETR as published, or false"
        settings["neck_activates"] = neck.require("act_cfg", usual, False) is not False
    if "psp_modules.0.1.conv.weight" in head:
        settings["pool_scales"] = [int(n) for n in table.get("pool_scales", (1, 2, 3, 6))]
    if any(key.startswith("scale_heads.") for key in head):
        settings["strides"] = [int(n) for n in table.get("feature_strides", [4, 8, 16, 32])]
    if "up_convs.0.0.conv.weight" in head:
        usual = "4 of SETR's naive and MLA heads, 2 of PUP's"
        settings["up_scale"] = float(table.require("up_scale", usual, 4))
        settings["norm_eps"] = _eps(table, "norm_layer", 1e-6)
    if "reassemble_blocks.projects.0.conv.weight" in head:
        settings["readout"] = _readout(table, head)
    if "cls_emb" in head:
        dim = head["cls_emb"].shape[-1]
        settings["num_heads"] = int(table.require("num_heads", f"{max(1, dim // 64)}"))
        settings["norm_eps"] = _eps(table, "norm_cfg", 1e-5)
    if any(key.startswith("convs.") for key in head):
        settings["dilation"] = int(table.get("dilation", 1))
    is_known = table.find("in_index") is not None
    settings["in_index"] = (
        _in_index(table, levels) if is_known or not every else list(range(levels))
    )
    return settings


def _readout(table: Table, head: Mapping[str, Tensor]) -> str:
    """How class tokens reach patches."""
    table.only("expand_channels", False)
    if "reassemble_blocks.readout_projects.0.0.weight" in head:
        return "project"
    return str(table.require("readout_type", "'ignore' or 'add'", "ignore"))


def _in_index(table: Table, levels: int) -> list[int]:
    """The levels that the head reads, counted from 0."""
    if levels == 1:
        return [0]
    given = table.find("in_index")
    if given is None and "type" not in table.values:
        raise CheckpointError(
            f"the file does not say decode_head.in_index; set arguments = {{decode_head = "
            f"{{in_index = ...}}}}: one of the {levels} levels, or a list of them"
        )
    numbers = [-1] if given is None else [given] if isinstance(given, int) else list(given)
    if any(not isinstance(n, int) or not -levels <= n < levels for n in numbers):
        raise CheckpointError(f"decode_head.in_index is {given}; there are {levels} levels")
    return [n % levels for n in numbers]


def _eps(table: Table, name: str, default: float) -> float:
    """The epsilon of a layer norm's table; the default of its code for none."""
    norm = table.find(name)
    value = norm.get("eps") if isinstance(norm, Mapping) else None
    if value is None and "type" not in table.values:
        table.assumed[f"{table.name}.{name}.eps"] = default
    return default if value is None else float(value)


def in_segmenters_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those of mmsegmentation's Segmenter under its authors' names."""
    if "decode_head.dec_proj.weight" not in tensors:
        return dict(tensors)
    head = in_timms_names(below(tensors, "decode_head."))
    named = {k: v for k, v in tensors.items() if not k.startswith("decode_head.")}
    for key, value in head.items():
        for theirs, ours in RENAMED.items():
            key = key.replace(theirs, ours)
        # matrices there, applied from the right
        named[f"decode_head.{key}"] = value.T if key in ("proj_patch", "proj_classes") else value
    return named


def windows(
    config: Segmentor, window: tuple[int, int] | None, least: int = STRIDE
) -> dict[str, Any]:
    """Sliding windows: of the one size that the trunk takes, else of the test configuration.

    Args:
        least: the side of the smallest window that the trunk takes.

    Raises:
        CheckpointError: the configuration does not say whether windows slide, or they are too
            small.
    """
    test = config.test_cfg
    usual = "'whole', or 'slide' with crop_size and stride"
    mode = str(test.require("mode", usual, "whole")) if window is None else "slide"
    crop: list[int] | None = None
    if window is not None:
        crop = list(window)
    elif mode != "whole":
        crop = wholes("test_cfg.crop_size", test.require("crop_size", "[512, 512]"), least)
    scale = config.scale
    if scale is None:
        scale = (4 * min(crop), min(crop)) if crop else SCALE
        config.assumed["scale"] = list(scale)
    cut: dict[str, Any] = {"scale": list(scale), "keep_ratio": config.keep_ratio}
    if crop is None:
        return cut
    default = [side * 2 // 3 for side in crop]
    stride = test.get("stride", default) if window else test.require("stride", f"{default}")
    return cut | {"crop": crop, "stride": [int(n) for n in stride], "pads": window is not None}


def preprocess(config: Segmentor, size: Any) -> Preprocess:
    """The transform for other tasks than segmentation: squashed to `size`, a side or both."""
    default = Preprocess()
    for name, value in (("mean", config.mean), ("std", config.std)):
        if value is None:
            config.assumed[name] = list(getattr(default, name))
    rows, columns = (size, size) if isinstance(size, int) else size
    mean, std = config.mean or default.mean, config.std or default.std
    return Preprocess(
        input_size=(rows, columns),
        crop_mode="squash",
        crop_pct=1.0,
        interpolation="bilinear",
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )
