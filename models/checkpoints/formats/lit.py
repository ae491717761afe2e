"""LiT (arXiv 2111.07991, github.com/google-research/vision_transformer).

A JAX ViT under `img/`, a text tower under `txt/`, and the logarithm `t` of the temperature. Texts
need `tokenizer.json` beside the file, converted from upstream's vocabulary. The tower of
`LiT-L16S.npz` and `LiT-L16Ti.npz` is a transformer whose token ids are SentencePiece's, cut and
padded with `</s>` to one length; that of `LiT-B16B.npz` and `LiT-L16L.npz` is a BERT.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.checkpoints.families.flax_bert import bert_sizes, bert_state
from models.checkpoints.families.jax import (
    ENCODER,
    POSITIONS,
    TRUNCATED,
    from_jax,
    in_old_names,
    num_heads,
)
from models.checkpoints.families.jax_text import TEXT_KEYS, text_transformer, without_numbers
from models.checkpoints.families.known import Known, whole
from models.checkpoints.families.towers import LIBRARY, tower_states
from models.checkpoints.families.vit import split_prefix, vit_arguments
from models.errors import CheckpointError

NAME = "lit"
BERT = "BertEncoder/"
BERT_KEYS = re.compile(rf"head/(kernel|bias)|{BERT}.*")
IMAGE_KEYS = re.compile(rf"cls|(embedding|head)/(kernel|bias)|{POSITIONS}|Transformer/({ENCODER})")


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    keys = in_old_names(container.tensors).keys()
    if f"img/{POSITIONS}" in keys and any(key.startswith("txt/") for key in keys):
        return "a JAX ViT under img/, and a text tower under txt/"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: of a text transformer `pool_type`, the token that an embedding is read from:
    `last`, as in LiT, or `first`; of a BERT `max_len`, the tokens of a text (16), and
    `text_num_heads` (as published).

    Raises:
        CheckpointError: a tower is not as published.
    """
    tensors = in_old_names(container.tensors)
    img, _ = split_prefix(tensors, "img/")
    txt, _ = split_prefix(tensors, "txt/")
    txt = without_numbers(txt)
    left = [key for key in tensors if not key.startswith(("img/", "txt/")) and key != "t"]
    left += [f"img/{key}" for key in img if not IMAGE_KEYS.fullmatch(key)]
    is_bert = any(key.startswith(BERT) for key in txt)
    text_keys = BERT_KEYS if is_bert else TEXT_KEYS
    left += [f"txt/{key}" for key in txt if not text_keys.fullmatch(key)]
    if left:
        raise CheckpointError(f"{container.path}: left over: {', '.join(left[:10])}")
    known = Known(arguments)
    vision = from_jax(img)
    try:
        read = _bert if is_bert else _transformer
        text, language, tokenizer = read(txt, known, arguments)
        scale = tensors["t"]
        if "head/kernel" in img:
            vision["head.weight"] = img["head/kernel"].T.contiguous()
            vision["head.bias"] = img["head/bias"]
    except KeyError as error:
        raise CheckpointError(
            f"{container.path}: not a complete LiT: the weight {error} is missing"
        ) from error
    image: dict[str, Any] = {
        **vit_arguments(vision, {"num_heads": num_heads(img)}),
        "act_layer": "gelu_tanh",
    }
    if "cls_token" not in vision:
        image |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    dimensions = language["output_dim"]
    if dimensions != (image["num_classes"] or image["embed_dim"]):
        raise CheckpointError(
            f"{container.path}: embeddings of texts have {dimensions} dimensions, those of images "
            f"{image['num_classes'] or image['embed_dim']}"
        )
    size = image["img_size"]
    return Checkpoint(
        format=NAME,
        architecture=f"LiT with a ViT of width {image['embed_dim']}",
        library=LIBRARY,
        arguments={
            "image": {"architecture": "lit-vit", "positions": "fixed", **image},
            "text": language,
            "tokenizer": {**tokenizer, "folder": str(container.path.parent.absolute())},
        },
        state_dict=tower_states(vision, text, scale),
        preprocess=replace(TRUNCATED, input_size=(size, size)),
        assumed=known.assumed,
    )


Tower = tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]


def _transformer(txt: Mapping[str, Tensor], known: Known, arguments: Mapping[str, Any]) -> Tower:
    """The weights of a text transformer, its arguments, and those of its tokenizer."""
    text, language = text_transformer(txt, known)
    words = language["vocab_size"]
    source = f"a SentencePiece model of {words} words"
    return text, language, {"name": "sticky-eos", "source": source, "words": words}


def _bert(txt: Mapping[str, Tensor], known: Known, arguments: Mapping[str, Any]) -> Tower:
    """The weights of a BERT, its arguments, and those of its tokenizer."""
    inner, _ = split_prefix(txt, BERT)
    state = bert_state(inner)
    sizes = bert_sizes(state, arguments)
    known.get("text_num_heads", sizes["num_attention_heads"])
    head = txt["head/kernel"]
    text = {f"bert.{key}": value for key, value in state.items()}
    text |= {"head.weight": head.T.contiguous(), "head.bias": txt["head/bias"]}
    language = {"architecture": "lit-bert", "output_dim": head.shape[1], **sizes}
    words = sizes["vocab_size"]
    return (
        text,
        language,
        {
            "name": "leading-cls",
            "context_length": whole("max_len", known.get("max_len", 16)),
            "source": f"BERT's of {words} words",
            "words": words,
        },
    )
