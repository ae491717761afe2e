"""OpenAI's CLIP (arXiv 2103.00020, github.com/openai/CLIP): a flat state dict of both towers.

The published files are TorchScript archives, mostly in half precision, with three settings beside
the weights. open_clip writes the same keys for networks that differ in activation and heads, so
QuickGELU and heads of 64 channels are assumed only for files with those settings.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.checkpoints.families.known import number, whole
from models.checkpoints.families.open_clip import (
    FILE,
    Configuration,
    architectures_like,
    has_configuration,
    is_openai,
)
from models.checkpoints.families.open_clip_towers import convert_towers
from models.errors import CheckpointError

NAME = "openai-clip"

DENSE = "logit_multiplier"
MARKS = {
    "visual.conv1.weight",
    "text_projection",
    "token_embedding.weight",
    "ln_final.weight",
    "logit_scale",
}
# Widths whose published towers all have heads of 64 channels.
PUBLISHED_WIDTHS = (512, 768, 1024)
PREPROCESS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    """Both towers at the top level, without open_clip's configuration."""
    if container.tensors.keys() >= MARKS and not has_configuration(container, arguments):
        return "both towers of a CLIP: visual.conv1, token_embedding, text_projection, logit_scale"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `activation` (`quick_gelu`, `gelu`), `vision_heads` and `transformer_heads`,
    which files of others need; `logit_multiplier`, which makes it a model that labels patches
    instead of images.

    Raises:
        CheckpointError: the file has none of OpenAI's settings, and the arguments lack one.
    """
    tensors = container.tensors
    proven = is_openai(container)
    if not proven and "activation" not in arguments:
        names = architectures_like(tensors)
        such = f" (of this shape: {', '.join(names)})" if names else ""
        raise CheckpointError(
            f"{container.path}: the keys are OpenAI's and open_clip's, and nothing in the file "
            f"tells which. Put {FILE} beside it, or set architecture to open_clip's name of the "
            f"model{such}, or activation to quick_gelu (OpenAI's) or gelu"
        )
    activation = arguments.get("activation", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise CheckpointError(f"activation is {activation!r}; it is quick_gelu or gelu")
    vision, image_heads = _vision(tensors, arguments, proven)
    width = tensors["text_projection"].shape[0]
    heads = _heads("transformer_heads", width, arguments, proven)
    layers = {k.split(".")[2] for k in tensors if k.startswith("transformer.resblocks.")}
    text = {
        "context_length": tensors["positional_embedding"].shape[0],
        "vocab_size": tensors["token_embedding.weight"].shape[0],
        "width": width,
        "heads": heads,
        "layers": len(layers),
    }
    model = {
        "embed_dim": tensors["text_projection"].shape[1],
        "quick_gelu": activation == "quick_gelu",
        "vision_cfg": vision,
        "text_cfg": text,
    }
    counts = {"vision_heads": image_heads, "transformer_heads": heads, "activation": activation}
    assumed = {name: value for name, value in counts.items() if name not in arguments}
    if not proven:
        assumed["preprocess_cfg"] = PREPROCESS
    config = Configuration(model, PREPROCESS, assumed)
    checkpoint = convert_towers(NAME, container, config)
    named = {**checkpoint.arguments, "tokenizer": {"name": "openai"}}
    heads_beside = {}
    if DENSE in arguments:
        heads_beside["dense"] = HeadState({}, {"scale": number(DENSE, arguments[DENSE])})
    return replace(
        checkpoint,
        architecture=_architecture(tensors),
        arguments=named,
        heads=heads_beside,
    )


def _vision(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], proven: bool
) -> tuple[dict[str, Any], int]:
    """open_clip's `vision_cfg` by the shapes, and the number of heads."""
    if "visual.proj" not in tensors:  # a ResNet, whose last pooling attends
        width = tensors["visual.layer1.0.conv1.weight"].shape[0]
        cells = tensors["visual.attnpool.positional_embedding"].shape[0] - 1
        blocks = [
            len({k.split(".")[2] for k in tensors if k.startswith(f"visual.layer{stage}.")})
            for stage in range(1, 5)
        ]
        heads = _heads("vision_heads", width * 32, arguments, proven=True)
        return {
            "layers": blocks,
            "width": width,
            "head_width": width * 32 // heads,
            "image_size": 32 * round(cells**0.5),
        }, heads
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    cells = tensors["visual.positional_embedding"].shape[0] - 1
    heads = _heads("vision_heads", width, arguments, proven)
    layers = {k.split(".")[3] for k in tensors if k.startswith("visual.transformer.resblocks.")}
    return {
        "layers": len(layers),
        "width": width,
        "head_width": width // heads,
        "patch_size": patch,
        "image_size": patch * round(cells**0.5),
    }, heads


def _heads(name: str, width: int, arguments: Mapping[str, Any], proven: bool) -> int:
    if name in arguments:
        heads = whole(name, arguments[name])
        if heads < 1 or width % heads:
            raise CheckpointError(f"{name} is {heads}, which does not divide {width} channels")
        return heads
    if not proven and width not in PUBLISHED_WIDTHS:
        raise CheckpointError(
            f"the number of heads of {width} channels is not known; set {name}, such as "
            f"{max(1, width // 64)} (heads of 64 channels) or {max(1, width // 80)}"
        )
    return max(1, width // 64)


def _architecture(tensors: Mapping[str, Tensor]) -> str:
    if "visual.proj" not in tensors:
        return "CLIP with a ModifiedResNet"
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    return f"CLIP with a ViT of width {width}, patch {patch}"
