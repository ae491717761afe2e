"""Two-tower models (CLIP), split into an image trunk and a text trunk."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import build_model_from_openai_state_dict
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.strict import load_strictly
from models.errors import CheckpointError
from models.inputs.tokenizers import CuttingTokenizer, OpenAITokenizer
from models.inputs.transforms import Preprocess, preprocess_from_mapping
from models.networks import create_own
from models.trunks.devices import Placement
from models.trunks.open_clip import OpenClipTrunk
from models.trunks.text import (
    OpenClipText,
    SentenceEncoder,
    TextPreprocess,
    TextTower,
    Tokenize,
    fast_tokenizer,
)
from models.trunks.timm import TimmTrunk

_DROPPED: Any = None

ImageTower = OpenClipTrunk | TimmTrunk


@dataclass(frozen=True, slots=True)
class Towers:
    """Both trunks. Logits are `scale` times the similarity, plus `bias`.

    Args:
        bias: of models trained with a sigmoid loss (SigLIP); None for others.
    """

    image: ImageTower
    text: OpenClipText | TextTower
    scale: float
    bias: float | None

    def without(self, kept: str) -> "Towers":
        """A copy without the tower that is not `kept` ("image" or "text"), to free its memory."""
        return replace(self, **{"image" if kept == "text" else "text": _DROPPED})


def towers_of_openai(checkpoint: Checkpoint, placement: Placement) -> Towers:
    """The towers of a state dict in OpenAI's layout, in float32, as upstream runs them on CPUs.

    Raises:
        CheckpointError: the weights do not fit.
    """
    try:
        network = build_model_from_openai_state_dict(
            dict(checkpoint.state_dict),
            quick_gelu=checkpoint.arguments.get("quick_gelu", True),
            cast_dtype=torch.float32,
        ).float()
        # open_clip has rounded the weights to half precision.
        network.load_state_dict({k: v.float() for k, v in checkpoint.state_dict.items()})
    except (RuntimeError, KeyError, AssertionError) as error:
        raise CheckpointError(f"not a complete CLIP: {error}") from error
    tokenizer = OpenAITokenizer(network.context_length)
    return split_towers(
        checkpoint.architecture,
        network,
        checkpoint.preprocess or Preprocess(),
        tokenizer,
        placement,
    )


def towers_of_two(checkpoint: Checkpoint, placement: Placement) -> Towers:
    """The towers of a checkpoint whose image tower is in `models/networks/`, with CLIP's text
    transformer.

    Raises:
        CheckpointError: the weights do not fit.
    """
    text = dict(checkpoint.arguments["text"])
    towers: dict[str, dict[str, Tensor]] = {"image": {}, "text": {}}
    for key, value in checkpoint.state_dict.items():
        tower, _, name = key.partition(".")
        if tower in towers:
            towers[tower][name] = value
    vision = create_own(**checkpoint.arguments["image"])
    load_strictly(vision, towers["image"], "the image tower")
    norm_layer = partial(LayerNorm, eps=text.pop("norm_eps", 1e-5))
    language = TextTransformer(act_layer=QuickGELU, norm_layer=norm_layer, **text)
    load_strictly(language, towers["text"], "the text tower")
    length = text["context_length"]
    cut_end = checkpoint.arguments.get("cut_end", False)
    tokenizer = CuttingTokenizer(length) if cut_end else OpenAITokenizer(length)
    spec = TextPreprocess(length, _tokenizer_digest(tokenizer))
    name = checkpoint.architecture
    return Towers(
        TimmTrunk(name, vision, checkpoint.preprocess or Preprocess(), placement),
        TextTower(name, language, _single(tokenizer), spec, placement),
        float(checkpoint.state_dict["logit_scale"].exp()),
        None,
    )


def load_open_clip(
    architecture: str,
    pretrained: str | None,
    placement: Placement,
    preprocess: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
) -> Towers:
    """The towers of an open_clip model.

    Args:
        pretrained: open_clip's tag of the weights.
        preprocess: overrides of open_clip's preprocessing.
        tensors: a state dict, used instead of a tag.

    Raises:
        CheckpointError: the state dict does not fit, or open_clip has no such architecture.
        OSError, RuntimeError, ValueError: from open_clip.
    """
    if architecture not in open_clip.list_models():
        raise CheckpointError(f"open_clip has no architecture {architecture!r}")
    # If the weights were trained with another activation than the default, open_clip only warns.
    quick_gelu = bool(get_pretrained_cfg(architecture, pretrained or "").get("quick_gelu", False))
    network = open_clip.create_model(
        architecture,
        pretrained=pretrained,
        force_quick_gelu=quick_gelu or architecture.endswith("-quickgelu"),
    )
    if tensors is not None:
        load_strictly(network, tensors, architecture)
    spec = preprocess_from_mapping(preprocess, open_clip_preprocess(network))
    return split_towers(
        architecture, network, spec, open_clip.get_tokenizer(architecture), placement
    )


def open_clip_preprocess(network: nn.Module) -> Preprocess:
    """open_clip's preprocessing configuration in timm's terms. The transforms are the same."""
    config: Any = open_clip.get_model_preprocess_cfg(network)
    size = config["size"]
    modes = {"shortest": "center", "squash": "squash", "longest": "border"}
    return preprocess_from_mapping(
        {
            "input_size": (size, size) if isinstance(size, int) else tuple(size),
            "crop_mode": modes[config["resize_mode"]],
            "crop_pct": 1.0,
            "interpolation": config["interpolation"],
            "mean": tuple(config["mean"]),
            "std": tuple(config["std"]),
        }
    )


def load_sentence_encoder(
    path: Path, tokenizer_path: Path, arguments: Mapping[str, Any], placement: Placement
) -> SentenceEncoder:
    """A BERT from sentence-transformers' files: the weights, and `tokenizer.json`.

    Args:
        arguments: `num_attention_heads`, which the files do not contain, and optionally
            `context_length`.

    Raises:
        CheckpointError: tensors are missing, or belong to another architecture.
    """
    tensors = load_file(path)
    tensors.pop("embeddings.position_ids", None)  # a constant, stored by older versions
    network = BertModel(_bert_config(tensors, arguments), add_pooling_layer=True)
    expected = network.state_dict().keys()
    if expected != tensors.keys():
        names = ", ".join(sorted(expected ^ tensors.keys())[:10])
        raise CheckpointError(
            f"{path}: not a BERT saved by sentence-transformers; missing or unexpected: {names}"
        )
    network.load_state_dict(tensors)
    context_length = int(arguments.get("context_length", 256))
    content = tokenizer_path.read_text(encoding="utf-8")
    tokenize = fast_tokenizer(Tokenizer.from_str(content), context_length)
    digest = "sha256:" + hashlib.sha256(content.encode()).hexdigest()
    spec = TextPreprocess(context_length, digest)
    return SentenceEncoder("BERT, mean pooling", network, tokenize, spec, placement)


def _bert_config(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> BertConfig:
    vocabulary = tensors["embeddings.word_embeddings.weight"]
    layers = {key.split(".")[2] for key in tensors if key.startswith("encoder.layer.")}
    return BertConfig(
        vocab_size=vocabulary.shape[0],
        hidden_size=vocabulary.shape[1],
        num_hidden_layers=len(layers),
        num_attention_heads=int(arguments["num_attention_heads"]),
        intermediate_size=tensors["encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=tensors["embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=tensors["embeddings.token_type_embeddings.weight"].shape[0],
    )


def split_towers(
    architecture: str, network: Any, spec: Preprocess, tokenizer: Any, placement: Placement
) -> Towers:
    """Split an open_clip model into two trunks. The model cannot be used afterwards."""
    scale = float(network.logit_scale.detach().exp())
    bias = getattr(network, "logit_bias", None)
    image = OpenClipTrunk(architecture, network, spec, placement)
    del network.visual
    text_spec = TextPreprocess(tokenizer.context_length, _tokenizer_digest(tokenizer))
    text = OpenClipText(architecture, network, _single(tokenizer), text_spec, placement)
    return Towers(image, text, scale, None if bias is None else float(bias.detach()))


def _single(tokenizer: Any) -> Tokenize:
    return lambda text: tokenizer([text])[0]


def _tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer: over the ids of texts on which tokenizers differ."""
    probes = ["A photo of a cat.", "naïve  CAFÉ", "12 €, 日本語 &amp; <|endoftext|>", "zyxwvut"]
    ids = json.dumps(tokenizer(probes).tolist())
    return "sha256:" + hashlib.sha256(f"{type(tokenizer).__name__} {ids}".encode()).hexdigest()
