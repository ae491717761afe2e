"""OpenAI's CLIP (arXiv 2103.00020, github.com/openai/CLIP): a flat state dict of both towers.

The published files are TorchScript archives, mostly in half precision.
"""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.checkpoint import Checkpoint, HeadState
from models.checkpoints.containers import Container
from models.inputs.transforms import Preprocess

NAME = "openai-clip"

# Settings that the archives hold beside the weights.
SETTINGS = ("input_resolution", "context_length", "vocab_size")
DENSE = "logit_multiplier"
MARKS = {
    "visual.conv1.weight",
    "text_projection",
    "token_embedding.weight",
    "ln_final.weight",
    "logit_scale",
}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def matches(container: Container, arguments: Mapping[str, Any]) -> str | None:
    """Both towers at the top level. open_clip's own files need `library = "open_clip"` instead."""
    if container.tensors.keys() >= MARKS:
        return "both towers of a CLIP: visual.conv1, token_embedding, text_projection, logit_scale"
    return None


def convert(container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
    """`arguments`: `activation` (`quick_gelu`; `gelu` for weights of others in this layout);
    `logit_multiplier`, which makes it a model that labels patches instead of images."""
    tensors = dict(container.tensors)
    for key in SETTINGS:
        tensors.pop(key, None)
    size = _image_size(tensors)
    heads = {}
    if DENSE in arguments:
        heads["dense"] = HeadState({}, {"scale": float(arguments[DENSE])})
    return Checkpoint(
        format=NAME,
        library="openai-clip",
        architecture=_architecture(tensors),
        arguments={"quick_gelu": arguments.get("activation", "quick_gelu") == "quick_gelu"},
        state_dict=tensors,
        heads=heads,
        preprocess=Preprocess(input_size=(size, size), crop_pct=1.0, mean=CLIP_MEAN, std=CLIP_STD),
    )


def _image_size(tensors: Mapping[str, Any]) -> int:
    if "visual.proj" in tensors:
        patch = int(tensors["visual.conv1.weight"].shape[-1])
        cells = int(tensors["visual.positional_embedding"].shape[0]) - 1
        return int(patch * round(cells**0.5))
    cells = int(tensors["visual.attnpool.positional_embedding"].shape[0]) - 1
    return int(32 * round(cells**0.5))


def _architecture(tensors: Mapping[str, Any]) -> str:
    if "visual.proj" not in tensors:
        return "CLIP with a ModifiedResNet"
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    return f"CLIP with a ViT of width {width}, patch {patch}"
