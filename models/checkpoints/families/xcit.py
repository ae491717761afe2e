"""XCiT (arXiv 2106.09681, github.com/facebookresearch/xcit): timm's arguments from the shapes."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.families.known import Known, flag
from models.checkpoints.families.ratios import mlp_ratio
from models.errors import CheckpointError
from models.inputs.transforms import Preprocess
from models.networks import OWN

MARK = "cls_attn_blocks.0.attn.qkv.weight"
TEMPERATURE = "blocks.0.attn.temperature"
# Whether the class attention's layers normalise all tokens, by the published widths (nano first).
TOKENS_NORM = {128: False, 192: True, 384: True, 512: True, 768: True}


def xcit_checkpoint(
    name: str,
    tensors: Mapping[str, Tensor],
    known: Known,
    *,
    preprocess: Preprocess | None = None,
    dropped: tuple[str, ...] = (),
) -> Checkpoint:
    """An XCiT as a checkpoint of format `name`.

    Args:
        known: `tokens_norm` (as published for the width), `img_size` in pixels, one side or both
            (224); both are assumed.
        preprocess: everything but the input size.
        dropped: keys that only training used.

    Raises:
        CheckpointError: patches are not embedded by three or four convolutions, or no published
            network has the width and `tokens_norm` is not known.
    """
    stem = {key.split(".")[2] for key in tensors if key.startswith("patch_embed.proj.")}
    if len(stem) not in (3, 4):
        raise CheckpointError(f"patches are embedded by {len(stem)} convolutions; XCiT has 3 or 4")
    dim = tensors["cls_token"].shape[-1]
    head = tensors.get("head.weight")
    only = "cls_attn_blocks."
    if dim in TOKENS_NORM:
        tokens_norm = known.get("tokens_norm", TOKENS_NORM[dim])
    else:
        tokens_norm = known.require("tokens_norm", "true, or false as in the nano networks")
    return Checkpoint(
        format=name,
        architecture="xcit",
        library=OWN,
        arguments={
            "patch_size": 2 ** len(stem),
            "embed_dim": dim,
            "depth": len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
            "num_heads": tensors[TEMPERATURE].shape[0],
            "mlp_ratio": mlp_ratio(len(tensors["blocks.0.mlp.fc1.weight"]), dim),
            "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
            "cls_attn_layers": len({k.split(".")[1] for k in tensors if k.startswith(only)}),
            "use_pos_embed": "pos_embeder.token_projection.weight" in tensors,
            "eta": 1.0 if "blocks.0.gamma1" in tensors else None,
            "tokens_norm": flag("tokens_norm", tokens_norm),
            "num_classes": 0 if head is None else head.shape[0],
        },
        state_dict=_in_timms_names(tensors),
        preprocess=replace(preprocess or Preprocess(), input_size=known.image_size()),
        dropped=dropped,
        assumed=known.assumed,
    )


def _in_timms_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Class attention has queries, keys and values apart in timm."""
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key.startswith("cls_attn_blocks.") and ".attn.qkv." in key:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                named[key.replace(".qkv.", f".{part}.")] = rows.contiguous()
        else:
            named[key.replace("pos_embeder.", "pos_embed.")] = value
    return named
