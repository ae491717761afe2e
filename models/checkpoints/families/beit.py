"""BEiT (arXiv 2106.08254, github.com/microsoft/unilm): timm's arguments from its shapes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.heads import VIT, head_count
from models.checkpoints.families.known import Known, flag, number
from models.checkpoints.families.ratios import mlp_ratio
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

SHARED = "rel_pos_bias.relative_position_bias_table"
OWN_TABLE = "blocks.0.attn.relative_position_bias_table"
INDEX = "relative_position_index"
HALF = (0.5, 0.5, 0.5)
SLIPS_HEADS = {**VIT, 384: 12}
SCRIPT = "layer_scale_init_value"  # an argument of BEiT's fine-tuning script alone
IBOTS_SCRIPT = "learned_abs_pos_emb"  # of iBOT's copy of it alone
STATISTICS = "imagenet_default_mean_and_std"


def beit_checkpoint(
    name: str,
    container: Container,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    global_pool: str,
    by_imagenet: bool | None = False,
    heads: Mapping[str, HeadState] | None = None,
    dropped: tuple[str, ...] = (),
) -> Checkpoint:
    """A BEiT as a checkpoint of format `name`.

    Args:
        tensors: the backbone in timm's names.
        arguments: `num_heads`, for files without tables of relative positions (as published), and
            `imagenet_default_mean_and_std`, whether pixels are normalised by ImageNet's statistics
            instead of being scaled to -1..1, and `crop_pct` of the evaluation (0.875, from
            384 pixels on 1); the training script's are the defaults. iBOT's copy of the script
            evaluates with bilinear interpolation, BEiT's with bicubic.
        global_pool: timm's pooling, `token` or `avg`.
        by_imagenet: `imagenet_default_mean_and_std` of the files that the authors publish; None if
            they publish such files with either.
        heads: the states of heads in the same file.
        dropped: keys of the file that are not among the tensors.

    Raises:
        CheckpointError: an argument does not fit the weights, or is needed and not known.
    """
    config = {**container.script, **arguments}
    known = Known(arguments, container.script)
    if by_imagenet is None:
        known.require(
            STATISTICS,
            "false for BEiT of ImageNet-22k, true for BEiT v2 and PeCo trained on ImageNet-1k",
        )
    by_imagenet = flag(STATISTICS, known.get(STATISTICS, by_imagenet))
    assumed = known.assumed
    preprocess = Preprocess() if by_imagenet else Preprocess(mean=HALF, std=HALF)
    if IBOTS_SCRIPT in container.script:
        preprocess = replace(preprocess, interpolation="bilinear")
    kept = {key: value for key, value in tensors.items() if not key.endswith(INDEX)}
    split_biases(kept)
    dim, _, _, patch = kept["patch_embed.proj.weight"].shape
    table = kept.get(SHARED, kept.get(OWN_TABLE))
    if table is not None:  # (2 h - 1)^2 rows, and three for the class token
        side = round(((table.shape[0] - 3) ** 0.5 + 1) / 2)
        num_heads = table.shape[1]
        if (stated := arguments.get("num_heads", num_heads)) != num_heads:
            raise CheckpointError(
                f"num_heads is {stated}; the tables of relative positions have {num_heads}"
            )
    else:
        side = round((kept["pos_embed"].shape[1] - 1) ** 0.5)
        # the script's small one, with which SLIP is fine-tuned, has heads of 32 channels
        is_slips = str(config.get("model")).startswith("beit_small")
        num_heads = head_count(dim, arguments, published=SLIPS_HEADS if is_slips else VIT)
        if "num_heads" not in arguments:
            assumed["num_heads"] = num_heads
    head = kept.get("head.weight")
    size = side * patch
    crop_pct = number("crop_pct", config.get("crop_pct") or (1.0 if size >= 384 else 0.875))
    built = {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": len({key.split(".")[1] for key in kept if key.startswith("blocks.")}),
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio(len(kept["blocks.0.mlp.fc1.weight"]), dim),
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
        preprocess=replace(preprocess, input_size=(size, size), crop_pct=crop_pct),
        dropped=(*dropped, *(key for key in tensors if key.endswith(INDEX))),
        assumed=assumed,
    )


def split_biases(state: dict[str, Tensor]) -> None:
    """Replace whole biases of queries, keys and values by those of queries and values.

    A bias of the keys adds the same to all of a query's scores, which a softmax ignores.
    """
    for key in [key for key in state if key.endswith(".attn.qkv.bias")]:
        queries, _, values = state.pop(key).chunk(3)
        name = key.removesuffix("qkv.bias")
        state |= {f"{name}q_bias": queries, f"{name}v_bias": values}
