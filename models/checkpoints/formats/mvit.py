"""MViT v1 and v2 (arXiv 2104.11227, 2112.01526) of images and clips, in SlowFast's container.

Weights are under `model_state`, the configuration is YAML text under `cfg`. Also reversible MViTs,
ViTs, which are MViTs that do not pool, and those of MaskFeat (arXiv 2112.09133) and MAE (arXiv
2205.09113), pre-trained or fine-tuned. Upstream is github.com/facebookresearch/SlowFast, and
github.com/facebookresearch/mvit, which is for images alone, has other defaults and writes sizes of
two numbers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import yaml
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.known import flag, number, whole
from models.checkpoints.families.mvit import (
    REVERSIBLE,
    is_planar,
    plain_blocks,
    reversible_blocks,
)
from models.errors import CheckpointError
from models.inputs.transforms import ChannelOrder, ClipPreprocess, Preprocess
from models.networks import OWN
from models.reference_outputs import ReferenceRun

NAME = "mvit"
VIDEO_MEAN, VIDEO_STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
BLOCK = re.compile(r"blocks\.0\.attn\.(pool_|qkv\.|q\.)")
# What only pre-training uses: MaskFeat's and MAE's predictions of masked patches.
PRETRAINING = ("mask_token", "pred_head.", "hogs.", "decoder_embed.", "decoder_pos_embed",
               "dec_pos_embed_")  # fmt: skip


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if container.wrapper != "model_state":
        return None
    keys = container.tensors.keys()
    if "patch_embed.proj.weight" in keys and any(BLOCK.match(key) for key in keys):
        return "blocks of an MViT, under model_state"
    if any(key.startswith(f"{REVERSIBLE}0.F.attn.") for key in container.tensors):
        return "layers of a reversible MViT, under model_state"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: the configuration by SlowFast's names, for files without `cfg`.

    Raises:
        CheckpointError: there is no configuration, or it is of another network.
    """
    config = _config(container, arguments)
    dropped = tuple(key for key in container.tensors if key.startswith(PRETRAINING))
    tensors = _named({k: v for k, v in container.tensors.items() if k not in dropped})
    mvit, data = config["MVIT"], config.get("DATA", {})
    _check_task(container, config)
    if mvit.get("NORM", "layernorm") != "layernorm":
        raise CheckpointError(f"{container.path}: MVIT.NORM must be layernorm, as upstream has it")
    if "TRAIN_CROP_SIZE" not in data:
        raise CheckpointError(
            f"{container.path}: the input size is not known; set DATA.TRAIN_CROP_SIZE, such as 224"
        )
    side = whole("DATA.TRAIN_CROP_SIZE", data["TRAIN_CROP_SIZE"])
    image = container.tensors["patch_embed.proj.weight"].dim() == 4
    frames = 1 if image else whole("DATA.NUM_FRAMES", data.get("NUM_FRAMES", 8))
    reversible = any(key.startswith(REVERSIBLE) for key in tensors)
    planar = is_planar(mvit)
    stem = {
        name: _stem(mvit.get(f"PATCH_{key}", default[image:]), one)
        for name, key, default, one in (
            ("kernel_size", "KERNEL", [3, 7, 7], 1),
            ("stride", "STRIDE", [2, 4, 4], 1),
            ("padding", "PADDING", [1, 3, 3] if image else [2, 4, 4], 0),
        )
    }
    residual = flag("MVIT.RESIDUAL_POOLING", mvit.get("RESIDUAL_POOLING", planar))
    options = {
        "mlp_ratio": number("MVIT.MLP_RATIO", mvit.get("MLP_RATIO", 4.0)),
        "mode": mvit.get("MODE", "conv"),
        "pool_first": flag("MVIT.POOL_FIRST", mvit.get("POOL_FIRST", False)),
        "separate_qkv": any(key.endswith("0.F.attn.q.weight") for key in tensors)
        or "blocks.0.attn.q.weight" in tensors,
        "qkv_bias": any(key.endswith((".attn.qkv.bias", ".attn.q.bias")) for key in tensors),
        "spatial": any(key.endswith(".attn.rel_pos_h") for key in tensors),
        "temporal": any(key.endswith(".attn.rel_pos_t") for key in tensors),
        "residual": residual,
        "resized": not planar,
    }
    if reversible:
        options["res_path"] = mvit.get("REV", {}).get("RES_PATH", "conv")
        blocks = reversible_blocks(mvit, tensors)
    else:
        options["widen_in_attention"] = widened = _widens_in_attention(tensors, planar, mvit)
        blocks = plain_blocks(mvit, widened)
        if dropped:  # pre-training has no blocks after those that it predicts from
            numbers = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
            blocks = blocks[: len(numbers)]
    positions = "joint" if "pos_embed" in tensors else "none"
    positions = "separate" if "pos_embed_spatial" in tensors else positions
    fixed = flag("MVIT.USE_FIXED_SINCOS_POS", mvit.get("USE_FIXED_SINCOS_POS", False))
    assumed = _assumed(config, {"RESIDUAL_POOLING": residual})
    has_norm = "norm.weight" in tensors
    pooling = flag("MVIT.USE_MEAN_POOLING", mvit.get("USE_MEAN_POOLING", False))
    if not has_norm:  # of MaskFeat, which fine-tunes with the mean
        pooling = assumed["MVIT.USE_MEAN_POOLING"] = True
    head = tensors.get("head.projection.weight")
    fuse = mvit.get("REV", {}).get("RESPATH_FUSE", "concat") if reversible else None
    return Checkpoint(
        format=NAME,
        architecture="mvit",
        library=OWN,
        arguments={
            "size": [
                n // step for n, step in zip((frames, side, side), stem["stride"], strict=True)
            ],
            "blocks": blocks,
            "stem": stem,
            "num_classes": 0 if head is None else head.shape[0],
            "cls_token": "cls_token" in tensors,
            "positions": positions,
            "repeats": 2 if fixed else 1,
            "norm_stem": "norm_stem.weight" in tensors,
            "norm": has_norm,
            "mean_pooling": pooling,
            "fuse": fuse,
            **options,
        },
        state_dict=tensors,
        preprocess=_preprocess(data, side, None if image else frames),
        dropped=dropped,
        assumed=assumed,
    )


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`feature_map` (B, D, h, w), of clips (B, D, T, h, w); `probabilities` of classifiers."""
    named = {}
    network = run.network
    if run.trunk.num_classes:
        named["probabilities"] = run.trunk.classify(run.output).softmax(-1)
    patches = run.output.features[:, network.num_prefix_tokens :].transpose(1, 2)
    frames = network.size[0]
    side = round((patches.shape[-1] / frames) ** 0.5)
    if side * side * frames == patches.shape[-1]:
        cells = torch.unflatten(patches, 2, (frames, side, side))
        named["feature_map"] = cells[:, :, 0] if run.inputs["pixel_values"].dim() == 4 else cells
    return named


def _config(container: Container, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The file's configuration, or the arguments.

    Raises:
        CheckpointError: neither has the table `MVIT`.
    """
    try:
        stored = yaml.safe_load(container.beside.get("cfg") or "{}")
    except (yaml.YAMLError, AttributeError) as error:
        raise CheckpointError(f"{container.path}: its cfg is not YAML: {error}") from error
    config = stored if isinstance(stored, dict) and "MVIT" in stored else dict(arguments)
    if not isinstance(config.get("MVIT"), Mapping):
        raise CheckpointError(
            f"{container.path}: no configuration: it has no cfg, and arguments have no MVIT. Set "
            "MVIT and DATA to those tables of its YAML file"
        )
    return config


def _check_task(container: Container, config: Mapping[str, Any]) -> None:
    """Refuse detectors, and classifiers of several classes at once, whose weights look alike.

    Raises:
        CheckpointError: the configuration is of one of these.
    """
    detection, model = config.get("DETECTION") or {}, config.get("MODEL") or {}
    if detection.get("ENABLE"):
        raise CheckpointError(
            f"{container.path}: DETECTION.ENABLE is true; only classifiers of whole clips are "
            "supported"
        )
    if (activation := model.get("HEAD_ACT", "softmax")) != "softmax":
        raise CheckpointError(
            f"{container.path}: MODEL.HEAD_ACT is {activation!r}, for several classes at once; "
            "only softmax is supported"
        )


def _assumed(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that no shape tells and the configuration does not state, by their names."""
    return {f"MVIT.{name}": value for name, value in values.items() if name not in config["MVIT"]}


def _named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with pooling over time as well, of one frame where they have none."""
    named = {}
    for key, value in tensors.items():
        planar = ".attn.pool_" in key or key == "patch_embed.proj.weight"
        named[key] = value[:, :, None] if planar and value.dim() == 4 else value
    return named


def _preprocess(data: Mapping[str, Any], side: int, frames: int | None) -> Preprocess:
    """The transform of `DATA`. Only clips are normalised by 0.45 and 0.225 if it does not say."""
    clips = frames is not None
    plain = Preprocess()
    mean = tuple(data.get("MEAN", VIDEO_MEAN if clips else plain.mean))
    std = tuple(data.get("STD", VIDEO_STD if clips else plain.std))
    order: ChannelOrder = "bgr" if clips and data.get("REVERSE_INPUT_CHANNEL", False) else "rgb"
    if frames is None:
        return replace(plain, input_size=(side, side), mean=mean, std=std)
    return ClipPreprocess(
        input_size=(side, side),
        interpolation="bilinear",
        mean=mean,
        std=std,
        channels=order,
        frames=frames,
        sampling_rate=whole("DATA.SAMPLING_RATE", data.get("SAMPLING_RATE", 8)),
    )


def _stem(sizes: Sequence[int], one: int) -> list[int]:
    """Sizes in time, height and width; `one` frame's for those of images."""
    plain = [int(size) for size in sizes]
    return [one, *plain] if len(plain) == 2 else plain


def _widens_in_attention(
    tensors: Mapping[str, Tensor], planar: bool, mvit: Mapping[str, Any]
) -> bool:
    """Whether attention widens its input, by the first block that does; else as stated."""
    for key, value in tensors.items():
        if key.startswith("blocks.") and key.count(".") == 3 and key.endswith(".proj.weight"):
            number = key.split(".")[1]
            return bool(tensors[f"blocks.{number}.attn.proj.weight"].shape[0] == value.shape[0])
    return flag("MVIT.DIM_MUL_IN_ATT", mvit.get("DIM_MUL_IN_ATT", planar))
