"""MViT v1 and v2 (arXiv 2104.11227, 2112.01526) of images and clips, in SlowFast's container.

Weights are under `model_state`, the configuration is YAML text under `cfg`. Upstream:
github.com/facebookresearch/SlowFast, github.com/facebookresearch/mvit.
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
from models.inputs.transforms import ClipPreprocess, Preprocess
from models.networks import OWN
from models.reference_outputs import ReferenceRun

NAME = "mvit"
VIDEO_MEAN, VIDEO_STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    pooled = any(key.startswith("blocks.0.attn.pool_") for key in container.tensors)
    if container.wrapper == "model_state" and pooled:
        return "blocks that pool, under model_state"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: the configuration by SlowFast's names, for files without `cfg`."""
    config = _config(container, arguments)
    tensors = container.tensors
    stem = tensors["patch_embed.proj.weight"]
    if stem.dim() == 4 and "blocks.0.attn.rel_pos_h" in tensors:
        return _for_timm(tensors, config)
    return _for_torchvision(tensors, config)


def outputs(run: ReferenceRun) -> dict[str, Tensor]:
    """`feature_map` (B, D, h, w), of clips (B, D, T, h, w); `probabilities` of classifiers."""
    network = run.network
    prefix = 1 if run.output.features.shape[1] % 2 else 0
    patches = run.output.features[:, prefix:].transpose(1, 2)
    frames = network.last_grid[0] if hasattr(network, "last_grid") else 1
    side = round((patches.shape[-1] / frames) ** 0.5)
    cells = torch.unflatten(patches, 2, (frames, side, side))
    named = {"feature_map": cells[:, :, 0] if run.inputs["pixel_values"].dim() == 4 else cells}
    if run.trunk.num_classes:
        named["probabilities"] = run.trunk.classify(run.output).softmax(-1)
    return named


def _config(container: Container, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The file's configuration, or the arguments.

    Raises:
        CheckpointError: neither has the table `MVIT`.
    """
    try:
        stored = yaml.safe_load(container.beside.get("cfg") or "{}")
    except yaml.YAMLError as error:
        raise CheckpointError(f"{container.path}: its cfg is not YAML: {error}") from error
    config = stored if isinstance(stored, dict) and "MVIT" in stored else dict(arguments)
    if "MVIT" not in config:
        raise CheckpointError(
            f"{container.path}: no configuration: it has no cfg, and arguments have no MVIT"
        )
    return config


def _multipliers(pairs: Sequence[Sequence[float]], depth: int) -> list[float]:
    """A factor per block, from pairs of block and factor; 1 for the others."""
    factors = [1.0] * (depth + 1)
    for block, factor in pairs:
        factors[int(block)] = float(factor)
    return factors


def _blocks(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Arguments of torchvision's `MSBlockConfig` for each block."""
    mvit = config["MVIT"]
    depth = int(mvit["DEPTH"])
    dims, heads = (_multipliers(mvit.get(k) or (), depth) for k in ("DIM_MUL", "HEAD_MUL"))
    strides_q = {int(s[0]): _three(s[1:]) for s in mvit.get("POOL_Q_STRIDE") or ()}
    strides_kv = {int(s[0]): _three(s[1:]) for s in mvit.get("POOL_KV_STRIDE") or ()}
    if not strides_kv and mvit.get("POOL_KV_STRIDE_ADAPTIVE"):
        current = _three(mvit["POOL_KV_STRIDE_ADAPTIVE"])
        for number in range(depth):
            for axis, stride in enumerate(strides_q.get(number, ())):
                current[axis] = max(current[axis] // stride, 1)
            strides_kv[number] = list(current)
    kernel = _three(mvit.get("POOL_KVQ_KERNEL") or (1, 1, 1))
    in_attention = bool(mvit.get("DIM_MUL_IN_ATT", False))
    dim, count = int(mvit["EMBED_DIM"]), int(mvit["NUM_HEADS"])
    blocks = []
    for number in range(depth):
        count = round(count * heads[number])
        outputs = round(dim * dims[number if in_attention else number + 1])
        blocks.append(
            {
                "num_heads": count,
                "input_channels": dim,
                "output_channels": outputs,
                "kernel_q": kernel if number in strides_q else [],
                "kernel_kv": kernel if number in strides_kv else [],
                "stride_q": strides_q.get(number, []),
                "stride_kv": strides_kv.get(number, []),
            }
        )
        dim = outputs
    return blocks


def _three(sizes: Sequence[int]) -> list[int]:
    """Sizes in time, height and width, from those or from height and width alone."""
    plain = [int(size) for size in sizes]
    return [1, *plain] if len(plain) == 2 else plain


def _for_torchvision(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Checkpoint:
    """A `TokenMvit`: clips, and images with absolute positions."""
    mvit, data = config["MVIT"], config["DATA"]
    stem = tensors["patch_embed.proj.weight"]
    image = stem.dim() == 4
    size = int(data["TRAIN_CROP_SIZE"])
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = _torchvisions_name(key)
        if (key == "patch_embed.proj.weight" and image) or (
            ".attn.pool_" in key and value.dim() == 4
        ):
            value = value[:, :, None]
        elif key == "pos_embed":
            named["pos_encoding.class_pos"] = value[0, 0]
            named["pos_encoding.spatial_pos"] = value[0, 1:]
            named["pos_encoding.temporal_pos"] = value.new_zeros(1, value.shape[-1])
            continue
        elif key in ("cls_token", "pos_embed_class"):
            value = value.flatten()
        elif key in ("pos_embed_spatial", "pos_embed_temporal"):
            value = value[0]
        named[name] = value.contiguous()
    is_v2 = "blocks.0.attn.rel_pos_h" in tensors
    preprocess = replace(Preprocess(), input_size=(size, size))
    if not image:
        preprocess = ClipPreprocess(
            input_size=(size, size),
            interpolation="bilinear",
            mean=VIDEO_MEAN,
            std=VIDEO_STD,
            frames=int(data["NUM_FRAMES"]),
            sampling_rate=int(data.get("SAMPLING_RATE", 4)),
        )
    # images are clips of one frame
    time_size = [1] if image else []
    time_padding = [0] if image else []
    return Checkpoint(
        format=NAME,
        architecture="mvit-tokens",
        library=OWN,
        arguments={
            "img_size": size,
            "frames": 1 if image else int(data["NUM_FRAMES"]),
            "blocks": _blocks(config),
            "num_classes": tensors["head.projection.weight"].shape[0],
            "version": 2 if is_v2 else 1,
            "patch_embed_kernel": [*time_size, *mvit["PATCH_KERNEL"]],
            "patch_embed_stride": [*time_size, *mvit["PATCH_STRIDE"]],
            "patch_embed_padding": [*time_padding, *mvit["PATCH_PADDING"]],
        },
        state_dict=named,
        preprocess=preprocess,
    )


def _torchvisions_name(key: str) -> str:
    for theirs, ours in (
        ("patch_embed.proj.", "conv_proj."),
        ("cls_token", "pos_encoding.class_token"),
        ("pos_embed_spatial", "pos_encoding.spatial_pos"),
        ("pos_embed_temporal", "pos_encoding.temporal_pos"),
        ("pos_embed_class", "pos_encoding.class_pos"),
        (".mlp.fc1.", ".mlp.0."),
        (".mlp.fc2.", ".mlp.3."),
        ("head.projection.", "head.1."),
    ):
        key = key.replace(theirs, ours)
    if key.startswith("blocks.") and ".attn." not in key:
        return key.replace(".proj.", ".project.")
    key = key.replace(".attn.proj.", ".attn.project.0.")
    for part in "qkv":
        key = key.replace(f".pool_{part}.", f".pool_{part}.pool.")
        key = key.replace(f".norm_{part}.", f".pool_{part}.norm_act.0.")
    return key


def _for_timm(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Checkpoint:
    """timm's MViT v2: images with relative positions. A stage begins where the heads change."""
    blocks = _blocks(config)
    starts = [0]
    for number, block in enumerate(blocks[1:], 1):
        if block["num_heads"] != blocks[number - 1]["num_heads"]:
            starts.append(number)
    widened = [  # stages that widen in their first attention
        number
        for number in starts[1:]
        if tensors[f"blocks.{number}.attn.proj.weight"].shape[0]
        > tensors[f"blocks.{number}.norm1.weight"].shape[0]
    ]
    in_attention = len(widened) == len(starts) - 1
    stages = {
        number: stage for stage, start in enumerate(starts) for number in range(start, len(blocks))
    }
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = key.replace("head.projection.", "head.fc.")
        if key.startswith("blocks."):
            number, rest = int(key.split(".")[1]), ".".join(key.split(".")[2:])
            shortcut = "shortcut_proj_attn." if in_attention else "shortcut_proj_mlp."
            if rest.startswith("proj."):
                rest = rest.replace("proj.", shortcut)
            name = f"stages.{stages[number]}.blocks.{number - starts[stages[number]]}.{rest}"
        if ".attn.pool_" in key and value.dim() == 5:
            value = value[:, :, 0]
        named[name] = value.contiguous()
    mvit = config["MVIT"]
    size = int(config["DATA"]["TRAIN_CROP_SIZE"])
    ends = [*starts[1:], len(blocks)]
    dims = [tensors[f"blocks.{end - 1}.attn.proj.weight"].shape[0] for end in ends]
    token = "cls_token" in tensors
    return Checkpoint(
        format=NAME,
        architecture="mvit-images",
        library=OWN,
        arguments={
            "img_size": size,
            "num_classes": tensors["head.projection.weight"].shape[0],
            "global_pool": "token" if token else "avg",
            "config": {
                "depths": [end - start for start, end in zip(starts, ends, strict=True)],
                "embed_dim": dims,
                "num_heads": [blocks[start]["num_heads"] for start in starts],
                "mlp_ratio": float(mvit.get("MLP_RATIO", 4.0)),
                "expand_attn": in_attention,
                "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
                "use_cls_token": token,
                "residual_pooling": bool(mvit.get("RESIDUAL_POOLING", True)),
                "kernel_qkv": blocks[0]["kernel_kv"][1:] or [3, 3],
                "stride_q": [(blocks[start]["stride_q"] or [1, 1, 1])[1:] for start in starts],
                "stride_kv": [(blocks[start]["stride_kv"] or [1, 1, 1])[1:] for start in starts],
                "stride_kv_adaptive": None,
            },
        },
        state_dict=named,
        preprocess=Preprocess(input_size=(size, size)),
    )
