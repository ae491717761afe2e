"""From what a caller sent to what trunks take: decoded once, prepared for each trunk."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import InputError
from models.inputs.images import ImageLimits, decode_image
from models.inputs.tiling import View
from models.inputs.types import Input, Latent, Seed, Video
from models.trunks.generator import Generator
from models.trunks.text import MAX_CHARACTERS, TextTrunk

if TYPE_CHECKING:
    from models.model import Model


NUMBERS = "fiu"  # numpy's kinds


def decode(given: Input | Image.Image, limits: ImageLimits) -> Any:
    """An encoded image as an RGB one; anything else as it is.

    Raises:
        InputError: it cannot be decoded, or is over a limit.
    """
    return decode_image(given, limits) if isinstance(given, bytes) else given


def size_of(decoded: Any) -> tuple[int, int]:
    """An image's (width, height); 0 where there is none."""
    if isinstance(decoded, Image.Image):
        return decoded.size
    if isinstance(decoded, np.ndarray):
        return decoded.shape[2], decoded.shape[1]
    return 0, 0


def prepare(decoded: Any, model: "Model", view: View | None, limits: ImageLimits) -> list[Tensor]:
    """A decoded input as the model's trunk takes it: in one piece, or in those of the view.

    Raises:
        InputError: not what the trunk takes.
    """
    match decoded:
        case str():
            return [_text(decoded, model)]
        case np.ndarray():
            return [_pixels(decoded, model)]
        case Video():
            return [model.clip_transform(decoded.content, limits)]
        case Seed() | Latent():
            return [_latent(decoded, model)]
    return [model.transform(decoded)] if view is None else view.cut(decoded)


def _text(text: str, model: "Model") -> Tensor:
    if not text.strip():
        raise InputError("the text is empty", field="texts")
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"the text has {len(text)} characters; the limit is {MAX_CHARACTERS}", field="texts"
        )
    trunk = model.trunk_for("text")
    assert isinstance(trunk, TextTrunk)
    return trunk.tokenize(text)


def _pixels(pixels: np.ndarray, model: "Model") -> Tensor:
    wanted = (3, *model.trunk.preprocess.input_size)
    if pixels.shape != wanted:
        raise InputError(
            f"pixel_values for {model.name} have shape {list(wanted)}, not {list(pixels.shape)}",
            field="pixel_values",
        )
    if pixels.dtype.kind not in NUMBERS:
        raise InputError("pixel_values are no numbers", field="pixel_values")
    if not np.isfinite(pixels).all():
        raise InputError("pixel_values has values that are not finite", field="pixel_values")
    return torch.from_numpy(pixels.astype(np.float32))  # a copy: the message's memory is read-only


def _latent(given: Seed | Latent, model: "Model") -> Tensor:
    assert isinstance(model.trunk, Generator)
    spec = model.trunk.preprocess
    if isinstance(given, Seed):
        return spec.of_seed(given.value)
    if given.vector.shape != (spec.latent_dim,):
        raise InputError(
            f"latent for {model.name} has {spec.latent_dim} numbers, not {given.vector.shape}",
            field="latent",
        )
    if given.vector.dtype.kind not in NUMBERS:
        raise InputError("latent is no numbers", field="latent")
    if not np.isfinite(given.vector).all():
        raise InputError("latent has values that are not finite", field="latent")
    return spec.of_latent(torch.from_numpy(given.vector.astype(np.float32)))
