"""Text transformers of Google's JAX code (github.com/google-research/vision_transformer and
big_vision): arguments and weights of `LitText`."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.families.jax import ENCODER, encoder_blocks, num_heads
from models.checkpoints.families.known import Known
from models.checkpoints.families.ratios import mlp_ratio
from models.errors import CheckpointError

# Positions that open_clip's transformer can read the embedding from.
POOLINGS = ("last", "first")
# Older flax numbers modules of all classes together.
MODULE = re.compile(r"^(Embed|Encoder|BertEncoder)_\d+/")
BLOCK = "Encoder/encoderblock_"
TEXT_KEYS = re.compile(rf"Embed/embedding|pos_embedding|head/(kernel|bias)|Encoder/({ENCODER})")
# From timm's names to those of open_clip's transformer.
TEXT_NAMES = (
    ("blocks.", "transformer.resblocks."),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".attn.qkv.", ".attn.in_proj_"),
    (".attn.proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)


def without_numbers(txt: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, their outer modules without the numbers that flax gives them."""
    return {MODULE.sub(r"\1/", key): value for key, value in txt.items()}


def text_transformer(
    txt: Mapping[str, Tensor], known: Known
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a text transformer and its arguments.

    Args:
        txt: its tensors `without_numbers`.
        known: `pool_type`, the token that an embedding is read from (`last`).

    Raises:
        CheckpointError: another `pool_type`.
        KeyError: a weight is missing.
    """
    pooling = known.get("pool_type", "last")
    if pooling not in POOLINGS:
        raise CheckpointError(f"pool_type is {pooling!r}; set one of {', '.join(POOLINGS)}")
    text = _text_state(txt)
    length, width = text["positional_embedding"].shape
    return text, {
        "architecture": "lit-text",
        "pool_type": pooling,
        "context_length": length,
        "vocab_size": len(text["token_embedding.weight"]),
        "width": width,
        "heads": num_heads(txt, BLOCK),
        "layers": len({key.split(".")[2] for key in text if ".resblocks." in key}),
        "mlp_ratio": mlp_ratio(len(text["transformer.resblocks.0.mlp.c_fc.bias"]), width),
        "output_dim": len(text["text_projection.bias"]),
    }


def _text_state(txt: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower under the names of open_clip's `TextTransformer`."""
    state = {
        "token_embedding.weight": txt["Embed/embedding"],
        "positional_embedding": txt["pos_embedding"][0],
        "ln_final.weight": txt["Encoder/encoder_norm/scale"],
        "ln_final.bias": txt["Encoder/encoder_norm/bias"],
        "text_projection.weight": txt["head/kernel"].T,
        "text_projection.bias": txt["head/bias"],
    }
    for key, value in encoder_blocks(txt, BLOCK).items():
        for theirs, ours in TEXT_NAMES:
            key = key.replace(theirs, ours)
        state[key] = value
    return {key: value.contiguous() for key, value in state.items()}
