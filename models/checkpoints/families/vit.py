"""ViTs in timm's names: the network's arguments from a state dict's shapes."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.heads import VIT, head_count
from models.checkpoints.families.ratios import mlp_ratio
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN
from models.networks.vit import hybrid_stride

STEM = "patch_embed.proj.12.weight"
PATCHES = "patch_embed.proj.weight"
RESNET_STAGES = "patch_embed.backbone.stages."
HYBRID = "patch_embed.backbone.stem.conv.weight"
MARKS = {"cls_token", "pos_embed", PATCHES, "blocks.0.attn.qkv.weight"}


RENAMED = (
    ("register_tokens", "reg_token"),
    (".gamma_1", ".ls1.gamma"),
    (".gamma_2", ".ls2.gamma"),
    (".mlp.w12.", ".mlp.fc1."),
    (".mlp.w3.", ".mlp.fc2."),
)


def in_timms_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's tensors with registers, layer scale and SwiGLU under timm's names."""
    named = {}
    for key, value in tensors.items():
        for theirs, ours in RENAMED:
            key = key.replace(theirs, ours)
        named[key] = value
    return named


def vit_arguments(
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    published: Mapping[int, int] = VIT,
) -> dict[str, Any]:
    """Arguments of timm's `VisionTransformer`, from a state dict's shapes.

    Args:
        arguments: `num_heads`, which no shape determines.
        published: heads by channels, where every published network has the same.

    Raises:
        CheckpointError: `num_heads` is not known or does not divide the channels, or the position
            table is not that of a square grid.
    """
    if STEM in tensors:  # four convolutions of stride 2 instead of one
        dim, patch = tensors[STEM].shape[0], 16
    else:
        dim, _, _, patch = tensors["patch_embed.proj.weight"].shape
    if HYBRID in tensors:
        stages = {key.split(".")[3] for key in tensors if key.startswith(RESNET_STAGES)}
        patch *= hybrid_stride(len(stages))
    tokens = sum(name in tensors for name in ("cls_token", "dist_token"))
    rows, positioned = tensors["pos_embed"].shape[1], tokens
    # DeiT III, whose blocks have layer scale, has a table of patches alone
    if "blocks.0.ls1.gamma" in tensors and rows != tokens + _side(rows - tokens) ** 2:
        positioned = 0
    side = _side(rows - positioned)
    if side < 1 or rows != positioned + side**2:
        raise CheckpointError(f"pos_embed has {rows} rows, which is not a square grid of patches")
    head = tensors.get("head.weight")
    registers = tensors.get("reg_token")
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
        "num_heads": head_count(dim, arguments, published=published),
        "mlp_ratio": mlp_ratio(len(tensors["blocks.0.mlp.fc1.weight"]), dim),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        "reg_tokens": 0 if registers is None else registers.shape[1],
        "no_embed_class": positioned < tokens,
        "num_classes": 0 if head is None else head.shape[0],
    }


def _side(cells: int) -> int:
    return math.isqrt(max(cells, 0))


def vit_checkpoint(
    name: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    positions: str,
    heads: Mapping[str, HeadState] | None = None,
    preprocess: Preprocess | None = None,
    dropped: tuple[str, ...] = (),
    published: Mapping[int, int] = VIT,
    assumed: Mapping[str, Any] | None = None,
    architecture: str = "vit",
    **built: Any,
) -> Checkpoint:
    """A plain ViT in timm's names as a checkpoint of format `name`.

    Args:
        tensors: the whole state dict, and nothing else.
        arguments: `num_heads` (as published, reported as assumed).
        positions: the rule of `models/networks/vit.py` for resizing positions.
        heads: the states of heads in the same file.
        preprocess: everything but the input size.
        dropped: keys that only training used.
        published: heads by channels, where every published network has the same.
        assumed: what else neither the file nor `arguments` give.
        architecture: the network's name.
        built: arguments of the network that no shape determines.

    Raises:
        CheckpointError: `pos_embed` or the first block's MLP is missing.
    """
    needed = {"pos_embed", "blocks.0.mlp.fc1.weight"}
    if missing := sorted(needed - tensors.keys()):
        raise CheckpointError(f"not a whole ViT: {', '.join(missing)} is missing")
    network = {**vit_arguments(tensors, arguments, published), **built}
    size = network["img_size"]
    heads_assumed = {} if "num_heads" in arguments else {"num_heads": network["num_heads"]}
    return Checkpoint(
        format=name,
        architecture=architecture,
        library=OWN,
        arguments={"positions": positions, **network},
        state_dict=dict(tensors),
        heads=heads or {},
        preprocess=replace(preprocess or Preprocess(), input_size=(size, size)),
        dropped=dropped,
        assumed=heads_assumed | dict(assumed or {}),
    )


def choose_weights(
    container: Container, arguments: Mapping[str, Any], default: str
) -> Mapping[str, Tensor]:
    """One of a file's sets of weights, such as `student` and `teacher`.

    Args:
        arguments: `weights` names the set; `model_` and `state_dict_` before its name are optional.
        default: the set without `weights`; a file with a single state dict is that set.

    Raises:
        CheckpointError: the file has no such set.
    """
    name = str(arguments.get("weights", default))
    if not container.sets and "weights" not in arguments:
        return container.tensors
    for key in (name, f"model_{name}", f"state_dict_{name}"):
        if key in container.sets:
            return container.sets[key]
    raise CheckpointError(
        f"{container.path} has no weights {name!r}; it has {', '.join(container.sets)}"
    )


def split_prefix(
    tensors: Mapping[str, Tensor], prefix: str, *, drop: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors below a prefix under their names without it, and the keys of all others.

    Args:
        drop: beginnings of names below the prefix that count as others.
    """
    kept: dict[str, Tensor] = {}
    others = []
    for key, value in tensors.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and not name.startswith(drop):
            kept[name] = value
        else:
            others.append(key)
    return kept, tuple(others)
