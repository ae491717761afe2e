"""ViTs in timm's names: the network's arguments from a state dict's shapes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.heads import VIT, head_count
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

STEM = "patch_embed.proj.12.weight"
PATCHES = "patch_embed.proj.weight"
MARKS = {"cls_token", "pos_embed", PATCHES, "blocks.0.attn.qkv.weight"}


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
        CheckpointError: `num_heads` is not known, or does not divide the channels.
    """
    if STEM in tensors:  # four convolutions of stride 2 instead of one
        dim, patch = tensors[STEM].shape[0], 16
    else:
        dim, _, _, patch = tensors["patch_embed.proj.weight"].shape
    prefix = sum(name in tensors for name in ("cls_token", "dist_token"))
    cells = tensors["pos_embed"].shape[1] - prefix
    side = round(cells**0.5)
    head = tensors.get("head.weight")
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
        "num_heads": head_count(dim, arguments, published=published),
        "mlp_ratio": tensors["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "num_classes": 0 if head is None else head.shape[0],
    }


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
        built: arguments of the network that no shape determines.

    Raises:
        CheckpointError: `pos_embed` or the first block's MLP is missing.
    """
    needed = {"pos_embed", "blocks.0.mlp.fc1.weight"}
    if missing := sorted(needed - tensors.keys()):
        raise CheckpointError(f"not a whole ViT: {', '.join(missing)} is missing")
    network = {**vit_arguments(tensors, arguments, published), **built}
    size = network["img_size"]
    return Checkpoint(
        format=name,
        architecture="vit",
        library=OWN,
        arguments={"positions": positions, **network},
        state_dict=dict(tensors),
        heads=heads or {},
        preprocess=replace(preprocess or Preprocess(), input_size=(size, size)),
        dropped=dropped,
        assumed={} if "num_heads" in arguments else {"num_heads": network["num_heads"]},
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
