"""Resize and crop: the transform of most checkpoints. Only what the crop shows is computed.

It equals Pillow's resize and torchvision's crop bit for bit. JPEG files may be decoded at a reduced
size before (`decode_reduced`), which changes pixels.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from models.inputs.images import ReducedImage

INTERPOLATIONS = ("bicubic", "bilinear")
# A reduced image is at least this many times as large as it is resized to. Pixels decoded at less
# than that differ visibly from those of the whole image (docs/benchmarks.md).
OVERSAMPLING = 2


def create_crop_transform(
    input_size: tuple[int, int],
    interpolation: str,
    fill: tuple[int, int, int],
    resized: Callable[[int, int], tuple[int, int]],
    *,
    early: bool = False,
) -> Callable[[Image.Image | ReducedImage], Tensor]:
    """Build the transform: RGB image to (3, height, width) uint8.

    Args:
        input_size: (height, width) that is cut from the middle of the resized image.
        interpolation: `bicubic` or `bilinear`.
        fill: the RGB colour where the resized image is smaller.
        resized: the (height, width) that an image of some (width, height) is resized to.
        early: an odd pixel beside what is cut is below or on the right of it.
    """
    from models.inputs.resample import resample, taps  # compiles, which gateways do without

    colour = np.array(fill, np.uint8)

    def transform(image: Image.Image | ReducedImage) -> Tensor:
        if isinstance(image, Image.Image):
            image = ReducedImage(image, image.size)
        pixels_HWC = _pixels_of(image.image)
        size = resized(*image.size)
        shown, places, sides = [], [], zip(pixels_HWC.shape, reversed(image.size), strict=False)
        for (length, full), side, target in zip(sides, size, input_size, strict=True):
            window, place = overlap(side, target, early=early)
            shown.append(taps(length, side, window, interpolation, full / image.factor))
            places.append(place)
        window_HWC = resample(pixels_HWC, *shown)[..., :3]
        if window_HWC.shape[:2] != input_size:
            canvas_HWC = np.tile(colour, (*input_size, 1))
            canvas_HWC[tuple(places)] = window_HWC
            window_HWC = canvas_HWC
        return torch.from_numpy(np.ascontiguousarray(window_HWC)).permute(2, 0, 1)

    return transform


def overlap(length: int, target: int, *, early: bool) -> tuple[tuple[int, int], slice]:
    """Which part of a resized side is shown, and where in the input. Rounds as torchvision does,
    or else down."""
    if length < target:
        start = (target - length) // 2
        return (0, length), slice(start, start + length)
    start = (length - target) // 2 if early else round((length - target) / 2)
    return (start, start + target), slice(0, target)


def _pixels_of(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image: (H, W, 4) uint8 in its memory where that is in one piece, else a
    copy (H, W, 3)."""
    try:
        values = pa.array(image).flatten()
    except ValueError:  # Pillow divides large images into blocks
        return np.array(image)
    pixels_HWC: np.ndarray = np.from_dlpack(values).reshape(image.height, image.width, 4)
    return pixels_HWC
