"""open_clip's text towers of transformers (BERT, RoBERTa, mT5, NLLB): arguments from the shapes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.containers import Container
from models.errors import CheckpointError

TOWER = "text.transformer."
# By the kind of network what a hub's name has, and heads of published networks by channels.
# The Chinese RoBERTas of hfl are BERTs.
KINDS = {"chinese-roberta": "bert", "roberta": "roberta", "bert": "bert", "mt5": "mt5",
         "nllb": "m2m_100", "m2m100": "m2m_100"}  # fmt: skip
HEADS = {"roberta": {768: 12, 1024: 16}, "bert": {768: 12, 1024: 16}, "m2m_100": {1024: 16}}
# open_clip's without `hf_pooler_type`, and where that is null: others' is that of the class token.
POOLER = "mean_pooler"
POOLERS = {"roberta": POOLER, "mt5": POOLER}
RELATIVE = f"{TOWER}block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def hf_arguments(
    container: Container, state: Mapping[str, Tensor], config: Mapping[str, Any], embed_dim: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `HfTower`, from the shapes and `text_cfg`, and what is assumed.

    Raises:
        CheckpointError: another kind of network, or its number of heads is not known.
        KeyError: a weight is missing.
    """
    name = str(config["hf_model_name"])
    kind = next((kind for part, kind in KINDS.items() if part in name.lower()), None)
    if kind is None:
        raise CheckpointError(f"{container.path}: text towers of {name} are not supported")
    stated: dict[str, Any] = {}
    for key, value in config.items():
        if key.startswith("hf_") and isinstance(value, Mapping):
            stated |= value
    sizes = {"mt5": _mt5, "m2m_100": _m2m}.get(kind, _bert)(state, stated, kind)
    assumed = {}
    if kind != "mt5":  # whose tables of relative positions tell
        width: int = sizes["d_model" if kind == "m2m_100" else "hidden_size"]
        heads = stated.get("num_attention_heads", HEADS[kind].get(width))
        if heads is None:
            raise CheckpointError(
                f"{container.path}: the number of heads of {width} channels is not known; set "
                f"text_cfg.hf_model_kwargs.num_attention_heads, such as {max(1, width // 64)}"
            )
        sizes["encoder_attention_heads" if kind == "m2m_100" else "num_attention_heads"] = heads
        if "num_attention_heads" not in stated:
            assumed["num_attention_heads"] = heads
    hidden = None
    if "text.proj.weight" in state:
        hidden = 0
    elif "text.proj.0.weight" in state:
        hidden = state["text.proj.0.weight"].shape[0]
    return {
        "architecture": "open-clip-hf",
        "kind": kind,
        "embed_dim": embed_dim,
        "pooler": config.get("hf_pooler_type", POOLER) or POOLERS.get(kind, "cls_pooler"),
        "hidden": hidden,
        **sizes,
    }, assumed


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow a prefix of the tower's names."""
    start = f"{TOWER}{prefix}"
    return len({key[len(start) :].split(".")[0] for key in state if key.startswith(start)})


def _bert(state: Mapping[str, Tensor], stated: Mapping[str, Any], kind: str) -> dict[str, Any]:
    tables = f"{TOWER}embeddings.{{}}_embeddings.weight"
    words, width = state[tables.format("word")].shape
    roberta = kind == "roberta"
    return {
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": _count(state, "encoder.layer."),
        "intermediate_size": state[f"{TOWER}encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": state[tables.format("position")].shape[0],
        "type_vocab_size": state[tables.format("token_type")].shape[0],
        "layer_norm_eps": stated.get("layer_norm_eps", 1e-5 if roberta else 1e-12),
        "pad_token_id": stated.get("pad_token_id", 1 if roberta else 0),
        "hidden_act": stated.get("hidden_act", "gelu"),
    }


def _mt5(state: Mapping[str, Tensor], stated: Mapping[str, Any], kind: str) -> dict[str, Any]:
    words, width = state[f"{TOWER}embed_tokens.weight"].shape
    buckets, heads = state[RELATIVE].shape
    return {
        "vocab_size": words,
        "d_model": width,
        "num_layers": _count(state, "block."),
        "num_heads": heads,
        "d_kv": state[f"{TOWER}block.0.layer.0.SelfAttention.q.weight"].shape[0] // heads,
        "d_ff": state[f"{TOWER}block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "relative_attention_num_buckets": buckets,
        "use_cache": False,
        "pad_token_id": stated.get("pad_token_id", 0),
    }


def _m2m(state: Mapping[str, Tensor], stated: Mapping[str, Any], kind: str) -> dict[str, Any]:
    words, width = state[f"{TOWER}embed_tokens.weight"].shape
    return {
        "vocab_size": words,
        "d_model": width,
        "encoder_layers": _count(state, "layers."),
        "encoder_ffn_dim": state[f"{TOWER}layers.0.fc1.weight"].shape[0],
        "pad_token_id": stated.get("pad_token_id", 1),
    }
