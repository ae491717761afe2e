"""BEiT (arXiv 2106.08254, github.com/microsoft/unilm): timm's arguments from its shapes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.inputs.transforms import Preprocess
from models.networks import OWN

SHARED = "rel_pos_bias.relative_position_bias_table"
OWN_TABLE = "blocks.0.attn.relative_position_bias_table"
INDEX = "relative_position_index"
HALF = (0.5, 0.5, 0.5)


def beit_checkpoint(
    name: str,
    container: Container,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    global_pool: str,
    heads: Mapping[str, HeadState] | None = None,
) -> Checkpoint:
    """A BEiT as a checkpoint of format `name`.

    Pixels are scaled to -1..1, unless the training script's `imagenet_default_mean_and_std` says
    that they are normalised by ImageNet's statistics.

    Args:
        tensors: the backbone in timm's names.
        arguments: `num_heads`, for files without tables of relative positions (dim / 64).
        global_pool: timm's pooling, `token` or `avg`.
        heads: the states of heads in the same file.
    """
    by_imagenet = bool(container.script.get("imagenet_default_mean_and_std", False))
    preprocess = Preprocess() if by_imagenet else Preprocess(mean=HALF, std=HALF)
    kept = {key: value for key, value in tensors.items() if not key.endswith(INDEX)}
    dim, _, _, patch = kept["patch_embed.proj.weight"].shape
    table = kept.get(SHARED, kept.get(OWN_TABLE))
    if table is not None:  # (2 h - 1)^2 rows, and three for the class token
        side = round(((table.shape[0] - 3) ** 0.5 + 1) / 2)
        num_heads = table.shape[1]
    else:
        side = round((kept["pos_embed"].shape[1] - 1) ** 0.5)
        num_heads = int(arguments.get("num_heads", max(1, dim // 64)))
    head = kept.get("head.weight")
    size = side * patch
    built = {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": len({key.split(".")[1] for key in kept if key.startswith("blocks.")}),
        "num_heads": num_heads,
        "mlp_ratio": kept["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "qkv_bias": "blocks.0.attn.q_bias" in kept,
        "init_values": 0.1 if "blocks.0.gamma_1" in kept else None,
        "use_abs_pos_emb": "pos_embed" in kept,
        "use_rel_pos_bias": OWN_TABLE in kept,
        "use_shared_rel_pos_bias": SHARED in kept,
        "global_pool": global_pool,
        "num_classes": 0 if head is None else head.shape[0],
    }
    return Checkpoint(
        format=name,
        architecture="beit",
        library=OWN,
        arguments=built,
        state_dict=kept,
        heads=heads or {},
        preprocess=replace(
            preprocess, input_size=(size, size), crop_pct=1.0 if size >= 384 else 0.875
        ),
        dropped=tuple(key for key in tensors if key.endswith(INDEX)),
    )
