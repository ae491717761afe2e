"""Two-tower checkpoints of CLIP's text transformer and an image tower of `models/networks`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

LIBRARY = "two-towers"


def text_arguments(text: Mapping[str, Tensor], heads: Any = None) -> dict[str, Any]:
    """Arguments of open_clip's `TextTransformer`, from the shapes of a state dict in CLIP's names.

    Args:
        heads: the number of heads, which no shape determines; None is width / 64.
    """
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
    """Head counts that were assumed, keyed by the argument that overrides them.

    Args:
        names: the arguments for the image tower's and for the text tower's heads.
    """
    counts = dict(zip(names, (image_heads, text_heads), strict=True))
    return {name: heads for name, heads in counts.items() if name not in arguments}


def tower_states(
    image: Mapping[str, Tensor], text: Mapping[str, Tensor], logit_scale: Tensor
) -> dict[str, Tensor]:
    """Both towers' weights in one state dict, under `image.` and `text.` (see `towers_of_two`)."""
    state = {f"image.{key}": value for key, value in image.items()}
    state |= {f"text.{key}": value for key, value in text.items()}
    return state | {"logit_scale": logit_scale}
