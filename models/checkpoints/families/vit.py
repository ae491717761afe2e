"""What a ViT's state dict in timm's names says of its architecture."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

STEM = "patch_embed.proj.12.weight"
PATCHES = "patch_embed.proj.weight"
MARKS = {"cls_token", "pos_embed", PATCHES, "blocks.0.attn.qkv.weight"}


def vit_arguments(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of timm's `VisionTransformer` that a state dict's shapes tell; the number of
    heads is in no shape: `arguments["num_heads"]`, or else a head for every 64 channels.

    Raises:
        CheckpointError: the heads do not divide the channels.
    """
    if STEM in tensors:  # four convolutions of stride 2 instead of one
        dim, patch = tensors[STEM].shape[0], 16
    else:
        dim, _, _, patch = tensors["patch_embed.proj.weight"].shape
    prefix = sum(name in tensors for name in ("cls_token", "dist_token"))
    cells = tensors["pos_embed"].shape[1] - prefix
    side = round(cells**0.5)
    heads = int(arguments.get("num_heads", max(1, dim // 64)))
    if dim % heads:
        raise CheckpointError(f"num_heads is {heads}, which does not divide {dim} channels")
    head = tensors.get("head.weight")
    return {
        "img_size": side * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
        "num_heads": heads,
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
    **built: Any,
) -> Checkpoint:
    """A plain ViT in timm's names as a checkpoint of format `name`.

    Args:
        positions: the rule of `models/networks/vit.py` for other input sizes.
        built: arguments of the network that the shapes do not tell.

    Raises:
        CheckpointError: not a whole ViT.
    """
    needed = {"pos_embed", "blocks.0.mlp.fc1.weight"}
    if missing := sorted(needed - tensors.keys()):
        raise CheckpointError(f"not a whole ViT: {', '.join(missing)} missing")
    told = {**vit_arguments(tensors, arguments), **built}
    size = told["img_size"]
    own = preprocess or Preprocess()
    return Checkpoint(
        format=name,
        architecture="vit",
        library=OWN,
        arguments={"positions": positions, **told},
        state_dict=dict(tensors),
        heads=heads or {},
        preprocess=replace(own, input_size=(size, size)),
        dropped=dropped,
        assumed={} if "num_heads" in arguments else {"num_heads": told["num_heads"]},
    )


def choose_weights(
    container: Container, arguments: Mapping[str, Any], default: str
) -> Mapping[str, Tensor]:
    """The set of weights that `arguments["weights"]` names, or else the default one, which is the
    whole file where that is one state dict and no more.

    Raises:
        CheckpointError: the file has no such set.
    """
    wanted = str(arguments.get("weights", default))
    if not container.sets and "weights" not in arguments:
        return container.tensors
    for name in (wanted, f"model_{wanted}", f"state_dict_{wanted}"):
        if name in container.sets:
            return container.sets[name]
    raise CheckpointError(
        f"{container.path} has no weights {wanted!r}; it has {', '.join(container.sets)}"
    )


def split_prefix(
    tensors: Mapping[str, Tensor], prefix: str, *, drop: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors below a prefix, by their names without it; and the keys of all others. `drop`
    are beginnings of names below the prefix that only training needed."""
    kept: dict[str, Tensor] = {}
    others = []
    for key, value in tensors.items():
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and not name.startswith(drop):
            kept[name] = value
        else:
            others.append(key)
    return kept, tuple(others)
