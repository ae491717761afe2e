"""Two-tower checkpoints of CLIP's text transformer and an image tower of `models/networks`."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.checkpoints.families.heads import TEXT, head_count

LIBRARY = "two-towers"


def text_arguments(
    text: Mapping[str, Tensor], arguments: Mapping[str, Any], heads: str
) -> dict[str, Any]:
    """Arguments of open_clip's `TextTransformer`, from the shapes of a state dict in CLIP's names.

    Args:
        heads: the argument that states the number of heads, which no shape determines.
    """
    length, width = text["positional_embedding"].shape
    layers = {key.split(".")[2] for key in text if key.startswith("transformer.resblocks.")}
    return {
        "context_length": length,
        "vocab_size": text["token_embedding.weight"].shape[0],
        "width": width,
        "heads": head_count(width, arguments, name=heads, published=TEXT),
        "layers": len(layers),
        "output_dim": text["text_projection"].shape[1],
    }


def tower_states(
    image: Mapping[str, Tensor], text: Mapping[str, Tensor], logit_scale: Tensor
) -> dict[str, Tensor]:
    """Both towers' weights in one state dict, under `image.` and `text.` (see `towers_of_two`)."""
    state = {f"image.{key}": value for key, value in image.items()}
    state |= {f"text.{key}": value for key, value in text.items()}
    return state | {"logit_scale": logit_scale}
