"""Two-tower models (CLIP), split into an image trunk and a text trunk."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.strict import load_strictly
from models.errors import CheckpointError
from models.inputs.tokenizers import MissingTokenizer, bound_words, create_tokenizer
from models.inputs.transforms import Preprocess, preprocess_from_mapping
from models.networks import create_own
from models.networks.text_encoders import create_encoder
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


def towers_of_two(checkpoint: Checkpoint, placement: Placement) -> Towers:
    """The towers of a checkpoint that has two, which are networks of `models/networks/`.

    Raises:
        CheckpointError: the weights do not fit.
    """
    towers: dict[str, dict[str, Tensor]] = {"image": {}, "text": {}}
    scalars = {}
    for key, value in checkpoint.state_dict.items():
        tower, _, name = key.partition(".")
        if tower in towers:
            towers[tower][name] = value
        else:
            scalars[key] = value
    if scalars.keys() - {"logit_scale", "logit_bias"}:
        raise CheckpointError(f"left over: {', '.join(sorted(scalars)[:10])}")
    vision = create_own(**checkpoint.arguments["image"])
    load_strictly(vision, towers["image"], "the image tower", mapped=bool(placement.map_weights))
    language = create_own(**{"architecture": "clip-text", **checkpoint.arguments["text"]})
    load_strictly(language, towers["text"], "the text tower", mapped=bool(placement.map_weights))
    length = int(getattr(language, "context_length", 77))
    tokenizer = create_tokenizer(**{"context_length": length, **checkpoint.arguments["tokenizer"]})
    spec = TextPreprocess(tokenizer.context_length, _tokenizer_digest(tokenizer))
    name, own = checkpoint.architecture, checkpoint.preprocess or Preprocess()
    image_class = TimmTrunk if hasattr(vision, "forward_features") else OpenClipTrunk
    bias = scalars.get("logit_bias")
    return Towers(
        image_class(name, vision, own, placement),
        TextTower(name, language, _single(tokenizer), spec, placement),
        float(scalars["logit_scale"].exp()),
        None if bias is None else float(bias),
    )


def load_open_clip(
    architecture: str,
    pretrained: str | None,
    placement: Placement,
    preprocess: Mapping[str, Any],
) -> Towers:
    """The towers of an open_clip model, which open_clip downloads.

    Args:
        pretrained: open_clip's tag of the weights.
        preprocess: overrides of open_clip's preprocessing.

    Raises:
        CheckpointError: open_clip has no such architecture.
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
    network = create_encoder("bert", pools=True, **_bert_sizes(tensors, arguments))
    expected = network.state_dict().keys()
    if expected != tensors.keys():
        names = ", ".join(sorted(expected ^ tensors.keys())[:10])
        raise CheckpointError(
            f"{path}: not a BERT saved by sentence-transformers; missing or unexpected: {names}"
        )
    load_strictly(network, tensors, str(path), mapped=bool(placement.map_weights))
    context_length = int(arguments.get("context_length", 256))
    content = tokenizer_path.read_text(encoding="utf-8")
    tokenize = fast_tokenizer(Tokenizer.from_str(content), context_length)
    digest = "sha256:" + hashlib.sha256(content.encode()).hexdigest()
    spec = TextPreprocess(context_length, digest)
    return SentenceEncoder("BERT, mean pooling", network, tokenize, spec, placement)


def _bert_sizes(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = tensors["embeddings.word_embeddings.weight"]
    layers = {key.split(".")[2] for key in tensors if key.startswith("encoder.layer.")}
    return {
        "vocab_size": vocabulary.shape[0],
        "hidden_size": vocabulary.shape[1],
        "num_hidden_layers": len(layers),
        "num_attention_heads": int(arguments["num_attention_heads"]),
        "intermediate_size": tensors["encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": tensors["embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": tensors["embeddings.token_type_embeddings.weight"].shape[0],
    }


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
    bound_words(tokenizer)
    return lambda text: tokenizer([text])[0]


def _tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer: over the ids of texts on which tokenizers differ."""
    if isinstance(tokenizer, MissingTokenizer):
        return f"none: {tokenizer.source}"
    probes = ["A photo of a cat.", "naïve  CAFÉ", "12 €, 日本語 &amp; <|endoftext|>", "zyxwvut"]
    ids = json.dumps(tokenizer(probes).tolist())
    return "sha256:" + hashlib.sha256(f"{type(tokenizer).__name__} {ids}".encode()).hexdigest()
