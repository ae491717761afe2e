"""MViT v1 and v2 (arXiv 2104.11227, 2112.01526) of images and clips, in SlowFast's container.

Weights are under `model_state`, the configuration is YAML text under `cfg`. Also reversible MViTs,
and those fine-tuned from MaskFeat (arXiv 2112.09133). Upstream is
github.com/facebookresearch/SlowFast, and github.com/facebookresearch/mvit, which is for images
alone, has other defaults and writes sizes of two numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import yaml
from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.errors import CheckpointError
from models.inputs.transforms import ChannelOrder, ClipPreprocess, Preprocess
from models.networks import OWN
from models.reference_outputs import ReferenceRun

NAME = "mvit"
VIDEO_MEAN, VIDEO_STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
REVERSIBLE = "rev_backbone.layers."


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if container.wrapper != "model_state":
        return None
    if any(key.startswith("blocks.0.attn.pool_") for key in container.tensors):
        return "blocks that pool, under model_state"
    if any(key.startswith(f"{REVERSIBLE}0.F.attn.") for key in container.tensors):
        return "layers of a reversible MViT, under model_state"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: the configuration by SlowFast's names, for files without `cfg`.

    Raises:
        CheckpointError: there is no configuration, or it is of another network.
    """
    config = _config(container, arguments)
    tensors = _named(container.tensors)
    mvit, data = config["MVIT"], config.get("DATA", {})
    if mvit.get("NORM", "layernorm") != "layernorm":
        raise CheckpointError(f"{container.path}: MVIT.NORM must be layernorm, as upstream has it")
    if "TRAIN_CROP_SIZE" not in data:
        raise CheckpointError(
            f"{container.path}: the input size is not known; set DATA.TRAIN_CROP_SIZE, such as 224"
        )
    side = int(data["TRAIN_CROP_SIZE"])
    image = container.tensors["patch_embed.proj.weight"].dim() == 4
    frames = 1 if image else int(data.get("NUM_FRAMES", 8))
    reversible = any(key.startswith(REVERSIBLE) for key in tensors)
    planar = len(mvit.get("POOL_KVQ_KERNEL") or ()) == 2  # of the repository for images
    stem = {
        name: _stem(mvit.get(f"PATCH_{key}", default[image:]), one)
        for name, key, default, one in (
            ("kernel_size", "KERNEL", [3, 7, 7], 1),
            ("stride", "STRIDE", [2, 4, 4], 1),
            ("padding", "PADDING", [1, 3, 3] if image else [2, 4, 4], 0),
        )
    }
    residual = bool(mvit.get("RESIDUAL_POOLING", planar))
    options = {
        "mlp_ratio": float(mvit.get("MLP_RATIO", 4.0)),
        "mode": mvit.get("MODE", "conv"),
        "pool_first": bool(mvit.get("POOL_FIRST", False)),
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
        blocks = _reversible_blocks(mvit, tensors)
    else:
        options["widen_in_attention"] = widened = _widens_in_attention(tensors, planar, mvit)
        blocks = _blocks(mvit, widened)
    positions = "joint" if "pos_embed" in tensors else "none"
    positions = "separate" if "pos_embed_spatial" in tensors else positions
    fixed = bool(mvit.get("USE_FIXED_SINCOS_POS", False))
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
            "num_classes": tensors["head.projection.weight"].shape[0],
            "cls_token": "cls_token" in tensors,
            "positions": positions,
            "repeats": 2 if fixed else 1,
            "norm_stem": "norm_stem.weight" in tensors,
            "mean_pooling": bool(mvit.get("USE_MEAN_POOLING", False)),
            "fuse": fuse,
            **options,
        },
        state_dict=tensors,
        preprocess=_preprocess(data, side, None if image else frames),
        assumed=_assumed(config, {"RESIDUAL_POOLING": residual}),
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
        sampling_rate=int(data.get("SAMPLING_RATE", 8)),
    )


def _stem(sizes: Sequence[int], one: int) -> list[int]:
    """Sizes in time, height and width; `one` frame's for those of images."""
    plain = [int(size) for size in sizes]
    return [one, *plain] if len(plain) == 2 else plain


def _multipliers(pairs: Any, depth: int) -> list[float]:
    """A factor per block, from pairs of block and factor; 1 for the others."""
    factors = [1.0] * (depth + 1)
    for block, factor in pairs or ():
        factors[int(block)] = float(factor)
    return factors


def _rounded(width: int, factor: float, divisor: int) -> int:
    """Upstream's width times a factor, as a multiple of `divisor`."""
    scaled = width * factor
    result = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return int(result + divisor if result < 0.9 * scaled else result)


def _three(sizes: Sequence[int]) -> list[int]:
    """Sizes in time, height and width, from those or from height and width alone."""
    plain = [int(size) for size in sizes]
    return [1, *plain] if len(plain) == 2 else plain


def _pools(mvit: Mapping[str, Any], depth: int) -> list[dict[str, list[int]]]:
    """Kernels and strides of each block."""
    strides_q = {int(s[0]): _three(s[1:]) for s in mvit.get("POOL_Q_STRIDE") or ()}
    strides_kv = {int(s[0]): _three(s[1:]) for s in mvit.get("POOL_KV_STRIDE") or ()}
    if mvit.get("POOL_KV_STRIDE_ADAPTIVE"):
        current = _three(mvit["POOL_KV_STRIDE_ADAPTIVE"])
        for number in range(depth):
            for axis, stride in enumerate(strides_q.get(number, ())):
                current[axis] = max(current[axis] // stride, 1)
            strides_kv[number] = list(current)
    stated = mvit.get("POOL_KVQ_KERNEL")
    planar = all(len(s) < 4 for s in mvit.get("POOL_Q_STRIDE") or ())

    def kernel(stride: list[int]) -> list[int]:
        if stated:
            return _three(stated)
        if planar and stride:
            return [1, 3, 3]  # that repository's default
        return [step + 1 if step > 1 else step for step in stride]

    return [
        {
            "kernel_q": kernel(strides_q.get(number, [])) if number in strides_q else [],
            "kernel_kv": kernel(strides_kv.get(number, [])) if number in strides_kv else [],
            "stride_q": strides_q.get(number, []),
            "stride_kv": strides_kv.get(number, []),
        }
        for number in range(depth)
    ]


def _blocks(mvit: Mapping[str, Any], widen_in_attention: bool) -> list[dict[str, Any]]:
    """Arguments of each `Block`."""
    depth = int(mvit.get("DEPTH", 16))
    dims, heads = (_multipliers(mvit.get(key), depth) for key in ("DIM_MUL", "HEAD_MUL"))
    stem = dim = int(mvit.get("EMBED_DIM", 96))
    count = int(mvit.get("NUM_HEADS", 1))
    blocks = []
    for number, pool in enumerate(_pools(mvit, depth)):
        count = _rounded(count, heads[number], 1)
        ahead = number if widen_in_attention else number + 1
        width = _rounded(dim, dims[ahead], _rounded(count, heads[ahead], 1))
        sizes = {"dim": dim, "dim_out": width, "num_heads": count, "stem_dim": stem}
        blocks.append({**sizes, **pool})
        dim = width
    return blocks


def _reversible_blocks(
    mvit: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Arguments of each `ReversibleLayer`. Widths are those of the weights."""
    depth = int(mvit.get("DEPTH", 16))
    heads = _multipliers(mvit.get("HEAD_MUL"), depth)
    stem, count = int(mvit.get("EMBED_DIM", 96)), int(mvit.get("NUM_HEADS", 1))
    rev = mvit.get("REV", {})
    buffered = {int(number) for number in rev.get("BUFFER_LAYERS") or ()}
    blocks = []
    for number, pool in enumerate(_pools(mvit, depth)):
        count = _rounded(count, heads[number], 1)
        sizes = {
            "dim": tensors[f"{REVERSIBLE}{number}.F.norm.weight"].shape[0],
            "dim_out": tensors[f"{REVERSIBLE}{number}.F.attn.proj.weight"].shape[0],
            "num_heads": count,
            "stem_dim": stem,
            "fusion": rev.get("PRE_Q_FUSION", "avg") if number in buffered else None,
        }
        blocks.append({**sizes, **pool})
    return blocks


def _widens_in_attention(
    tensors: Mapping[str, Tensor], planar: bool, mvit: Mapping[str, Any]
) -> bool:
    """Whether attention widens its input, by the first block that does; else as stated."""
    for key, value in tensors.items():
        if key.startswith("blocks.") and key.count(".") == 3 and key.endswith(".proj.weight"):
            number = key.split(".")[1]
            return bool(tensors[f"blocks.{number}.attn.proj.weight"].shape[0] == value.shape[0])
    return bool(mvit.get("DIM_MUL_IN_ATT", planar))
