"""Checkpoints of two towers whose text tower is CLIP's transformer and whose image tower is one of
`models/networks`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

LIBRARY = "two-towers"


def text_arguments(text: Mapping[str, Tensor], heads: Any = None) -> dict[str, Any]:
    """The arguments of open_clip's `TextTransformer` that a state dict in CLIP's names tells;
    `heads` are in no shape: None is one for every 64 channels."""
    length, width = text["positional_embedding"].shape
    layers = {key.split(".")[2] for key in text if key.startswith("transformer.resblocks.")}
    return {
        "context_length": length,
        "vocab_size": text["token_embedding.weight"].shape[0],
        "width": width,
        "heads": int(heads or max(1, width // 64)),
        "layers": len(layers),
        "output_dim": text["text_projection"].shape[1],
    }


def assumed_heads(
    arguments: Mapping[str, Any], image_heads: int, text_heads: int, names: tuple[str, str]
) -> dict[str, int]:
    """The numbers of heads that nobody told, under the names that would tell them."""
    found = dict(zip(names, (image_heads, text_heads), strict=True))
    return {name: heads for name, heads in found.items() if name not in arguments}


def tower_states(
    image: Mapping[str, Tensor], text: Mapping[str, Tensor], logit_scale: Tensor
) -> dict[str, Tensor]:
    """Both towers' weights in one state dict, as `towers_of_two` takes them."""
    state = {f"image.{key}": value for key, value in image.items()}
    state |= {f"text.{key}": value for key, value in text.items()}
    return state | {"logit_scale": logit_scale}
