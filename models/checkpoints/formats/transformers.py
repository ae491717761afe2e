"""Checkpoints of Hugging Face's transformers (github.com/huggingface/transformers).

`model.safetensors` or `pytorch_model.bin`, with `config.json`, which states the network, and
`preprocessor_config.json`, which states the transform. ViT, DeiT, DINOv2 with and without
registers, ConvNeXt and V2, and CLIP are read; other networks are refused by their name.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.attention import attention_outputs as outputs
from models.checkpoints.families.attention import attention_request as request
from models.checkpoints.families.convnext import convnext_checkpoint
from models.checkpoints.families.known import Known, number, whole
from models.checkpoints.families.open_clip import Configuration
from models.checkpoints.families.open_clip_towers import convert_towers
from models.checkpoints.families.transformers_configuration import (
    FILE,
    read_beside,
    read_labels,
    read_preprocess,
)
from models.checkpoints.families.transformers_names import CLIP, CONVNEXT, VIT, renamed
from models.checkpoints.families.vit import vit_checkpoint
from models.errors import CheckpointError

NAME = "transformers"
# With or without the name of the backbone. `transformer.` is the name of others' ViTs.
MARK = re.compile(
    r"^((?!transformer\.)\w+\.)?embeddings\.patch_embeddings\.(projection\.)?weight$"
    r"|^vision_model\.embeddings\.patch_embedding\.weight$"
)
# Not served: the pooler, which published checkpoints leave untrained, and the mask of pre-training.
DROPPED = ("pooler.", "embeddings.mask_token")
CLASSIFIERS = ("classifier", "cls_classifier")
BUFFERS = ("position_ids",)

__all__ = ["NAME", "convert", "matches", "outputs", "request"]


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    if container.graph is None and any(MARK.match(key) for key in container.tensors):
        return "transformers' names of a patch embedding"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """No `arguments`: the files beside the weights state everything.

    Raises:
        CheckpointError: a file beside the weights is missing, or states what is not supported.
    """
    config = read_beside(container.path, FILE)
    if not config:
        raise CheckpointError(
            f"{container.path}: these are transformers' names for the weights, whose {FILE} is "
            "missing beside the file"
        )
    kind = config.get("model_type")
    if kind not in CONVERTERS:
        raise CheckpointError(
            f"{container.path}: transformers' {kind!r} is not supported. Supported are "
            f"{', '.join(CONVERTERS)}; of others, use the file of the authors, timm or open_clip"
        )
    checkpoint = CONVERTERS[kind](container, config)
    _check_task(container, config)
    preprocess = read_preprocess(container.path, kind)
    return replace(checkpoint, preprocess=preprocess, labels=read_labels(config))


def _check_task(container: Container, config: Mapping[str, Any]) -> None:
    """
    Raises:
        CheckpointError: a classifier whose scores are not those of a softmax.
    """
    found = (container.tensors.get(f"{name}.weight") for name in CLASSIFIERS)
    classes = [len(weight) for weight in found if weight is not None]
    problem = config.get("problem_type")
    if classes and problem not in (None, "single_label_classification"):
        raise CheckpointError(
            f"{container.path}: problem_type is {problem}, which is not supported"
        )
    if 1 in classes:
        raise CheckpointError(f"{container.path}: a classifier of one class is not supported")


def _vit(container: Container, config: Mapping[str, Any]) -> Checkpoint:
    kept, dropped = _kept(container, config)
    tensors = renamed(kept, VIT, ".qkv.")
    built: dict[str, Any] = {}
    heads: dict[str, HeadState] = {}
    kind, architecture = config["model_type"], "vit"
    if "dist_token" in tensors:
        architecture = "distilled-vit" if "head_dist.weight" in tensors else "vit"
        built = {} if architecture == "distilled-vit" else {"distilled": True}
    if kind.startswith("dinov2"):
        gated = config.get("use_swiglu_ffn", False)
        built = {"whole_patches": False, "gated": gated}
        head = {k: tensors.pop(k) for k in ("head.weight", "head.bias") if k in tensors}
        if head:
            named = {f"classifier.0.{k.removeprefix('head.')}": v for k, v in head.items()}
            heads["linear"] = HeadState(named, {"layers": [-1], "mean": "appended"})
    return vit_checkpoint(
        NAME,
        tensors,
        {"num_heads": whole("num_attention_heads", config.get("num_attention_heads"))},
        positions="antialias" if "reg_token" in tensors else "bicubic",
        heads=heads,
        dropped=dropped,
        architecture=architecture,
        norm_eps=number("layer_norm_eps", config.get("layer_norm_eps")),
        **built,
    )


def _convnext(container: Container, config: Mapping[str, Any]) -> Checkpoint:
    # that of the final norm; the others have a fixed one
    if (eps := number("layer_norm_eps", config.get("layer_norm_eps", 1e-12))) > 1e-6:
        raise CheckpointError(f"{container.path}: layer_norm_eps is {eps}, more than 1e-6")
    kept, dropped = _kept(container, config)
    known = Known({"img_size": config.get("image_size", 224)})
    return convnext_checkpoint(NAME, renamed(kept, CONVNEXT, ""), known, dropped)


def _clip(container: Container, config: Mapping[str, Any]) -> Checkpoint:
    image, text = config.get("vision_config") or {}, config.get("text_config") or {}
    if image.get("hidden_act") != text.get("hidden_act"):
        raise CheckpointError(f"{container.path}: the towers have different activations")
    for tower in (image, text):
        if number("layer_norm_eps", tower.get("layer_norm_eps", 1e-5)) != 1e-5:
            raise CheckpointError(f"{container.path}: layer_norm_eps must be 1e-5, as CLIP has it")
    act = image.get("hidden_act", "quick_gelu")
    if act not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"{container.path}: hidden_act is {act!r}; it is quick_gelu or gelu")
    kept = {k: v for k, v in container.tensors.items() if not k.endswith(BUFFERS)}
    tensors = renamed(kept, CLIP, ".in_proj_")
    width = whole("hidden_size", image.get("hidden_size", 768))
    heads = whole("num_attention_heads", image.get("num_attention_heads", 12))
    vision = _tower(image, 768, 12)
    vision |= {
        "head_width": width // heads,
        "patch_size": whole("patch_size", image.get("patch_size", 32)),
        "image_size": whole("image_size", image.get("image_size", 224)),
    }
    language = _tower(text, 512, 8)
    language |= {
        "heads": whole("num_attention_heads", text.get("num_attention_heads", 8)),
        "context_length": whole("max_position_embeddings", text.get("max_position_embeddings", 77)),
        "vocab_size": whole("vocab_size", text.get("vocab_size", 49408)),
    }
    preprocess = read_preprocess(container.path, "clip")
    model = {
        "embed_dim": whole("projection_dim", config.get("projection_dim", 512)),
        "quick_gelu": act == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": language,
    }
    transform = {
        "mean": preprocess.mean,
        "std": preprocess.std,
        "interpolation": preprocess.interpolation,
        "resize_mode": "shortest",
    }
    checkpoint = convert_towers(
        NAME, replace(container, tensors=tensors), Configuration(model, transform)
    )
    dropped = tuple(k for k in container.tensors if k.endswith(BUFFERS))
    return replace(checkpoint, dropped=(*checkpoint.dropped, *dropped))


def _tower(config: Mapping[str, Any], width: int, layers: int) -> dict[str, Any]:
    """open_clip's `width`, `layers` and `mlp_ratio`, with transformers' defaults."""
    width = whole("hidden_size", config.get("hidden_size", width))
    inner = whole("intermediate_size", config.get("intermediate_size", 4 * width))
    layers = whole("num_hidden_layers", config.get("num_hidden_layers", layers))
    return {"width": width, "layers": layers, "mlp_ratio": inner / width}


def _kept(
    container: Container, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The weights that are served, without the prefix of the backbone, and the keys of others.

    Raises:
        CheckpointError: the activation is not GELU, or images have other channels than three.
    """
    if (channels := config.get("num_channels", 3)) != 3:
        raise CheckpointError(f"{container.path}: num_channels is {channels}; only 3 is supported")
    if (act := config.get("hidden_act", "gelu")) != "gelu":
        raise CheckpointError(f"{container.path}: hidden_act is {act!r}; only gelu is supported")
    prefix = f"{config['model_type']}."
    kept, dropped = {}, []
    for key, value in container.tensors.items():
        name = key.removeprefix(prefix)
        if name.startswith(DROPPED):
            dropped.append(key)
        else:
            kept[name] = value
    return kept, tuple(dropped)


CONVERTERS: dict[str, Callable[[Container, Mapping[str, Any]], Checkpoint]] = {
    "vit": _vit,
    "deit": _vit,
    "dinov2": _vit,
    "dinov2_with_registers": _vit,
    "convnext": _convnext,
    "convnextv2": _convnext,
    "clip": _clip,
}
