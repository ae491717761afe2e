"""BERTs of flaxformer (github.com/google/flaxformer) in transformers' names."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.families.heads import head_count
from models.errors import CheckpointError

PUBLISHED = {768: 12, 1024: 16}  # heads of BERT's base and large
LAYER = r"encoder_block/layer_sequence/layers_(\d+)/"
NAMES = (
    (r"embedder/embedders_token_ids/embedding", "embeddings.word_embeddings.weight"),
    (r"embedder/embedders_position_ids/embedding", "embeddings.position_embeddings.weight"),
    (r"embedder/embedders_segment_ids/embedding", "embeddings.token_type_embeddings.weight"),
    (r"layer_norm/", "embeddings.LayerNorm."),
    (LAYER + r"attention_block/attention_layer/(query|key|value)/",
     r"encoder.layer.\1.attention.self.\2."),
    (LAYER + r"attention_block/dense_layer/", r"encoder.layer.\1.attention.output.dense."),
    (LAYER + r"attention_block/layer_norm/", r"encoder.layer.\1.attention.output.LayerNorm."),
    (LAYER + r"mlp_block/mlp/dense_layer/", r"encoder.layer.\1.intermediate.dense."),
    (LAYER + r"mlp_block/dense_layer/", r"encoder.layer.\1.output.dense."),
    (LAYER + r"mlp_block/layer_norm/", r"encoder.layer.\1.output.LayerNorm."),
)  # fmt: skip


def bert_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A BERT's tensors in the names of transformers' `BertModel`.

    Raises:
        CheckpointError: a tensor is not one of a flaxformer BERT.
    """
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for theirs, ours in NAMES:
            if (match := re.match(theirs, key)) is not None:
                part = key[match.end() :]
                name = match.expand(ours)
                break
        else:
            raise CheckpointError(f"left over: {key}, which is not of a BERT")
        if part == "kernel":  # heads may have an axis of their own, of inputs or of outputs
            rows = value.shape[0] if "attention.output" not in name else value[..., 0].numel()
            state[f"{name}weight"] = value.reshape(rows, -1).T.contiguous()
        elif part in ("scale", "bias"):
            state[name + {"scale": "weight"}.get(part, part)] = value.flatten()
        else:
            state[name] = value
    return state


def bert_sizes(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of transformers' `BertConfig`.

    Args:
        arguments: `text_num_heads` (as published).

    Raises:
        KeyError: a weight is missing.
        CheckpointError: the number of heads is not known, or does not divide the channels.
    """
    words, width = state["embeddings.word_embeddings.weight"].shape
    layers = {key.split(".")[2] for key in state if key.startswith("encoder.layer.")}
    return {
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": head_count(
            width, arguments, name="text_num_heads", published=PUBLISHED
        ),
        "intermediate_size": len(state["encoder.layer.0.intermediate.dense.bias"]),
        "max_position_embeddings": len(state["embeddings.position_embeddings.weight"]),
        "type_vocab_size": len(state["embeddings.token_type_embeddings.weight"]),
    }
