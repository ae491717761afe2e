"""The fast transform: torch's antialiased resize of uint8 pixels, without Pillow.

It computes what Pillow's resize does with weights of fewer bits, so some values differ by one
level. JPEG files may be decoded at a reduced size before (`decode_reduced`), which changes more
values. The whole image is resized and then cropped: torch's resize has no box, and a box of whole
pixels would shift the image by up to half a pixel.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.dlpack import from_dlpack

from models.inputs.images import ReducedImage

INTERPOLATIONS = ("bicubic", "bilinear")
# A reduced image is at least this many times as large as it is resized to. Pixels decoded at less
# than that differ visibly from those of the whole image (docs/benchmarks.md).
OVERSAMPLING = 2


def create_fast_transform(
    input_size: tuple[int, int],
    interpolation: str,
    fill: tuple[int, int, int],
    resized: Callable[[int, int], tuple[int, int]],
) -> Callable[[Image.Image | ReducedImage], Tensor]:
    """Build the transform: RGB image to (3, height, width) uint8.

    Args:
        input_size: (height, width) that is cut from the middle of the resized image.
        interpolation: `bicubic` or `bilinear`.
        fill: the RGB colour where the resized image is smaller.
        resized: the (height, width) that an image of some (width, height) is resized to.
    """
    colour = torch.tensor(fill, dtype=torch.uint8)

    def transform(image: Image.Image | ReducedImage) -> Tensor:
        if isinstance(image, Image.Image):
            image = ReducedImage(image, image.size)
        size = resized(*image.size)
        resized_BCHW = _resize(image, size, interpolation)
        canvas_HWC = colour.repeat(*input_size, 1)
        (from_y, to_y), (from_x, to_x) = map(_overlap, size, input_size)
        canvas_HWC[to_y, to_x] = resized_BCHW[0, :3, from_y, from_x].permute(1, 2, 0)
        return canvas_HWC.permute(2, 0, 1)

    return transform


def _resize(image: ReducedImage, size: tuple[int, int], interpolation: str) -> Tensor:
    """The image resized to (height, width), or a little beyond: (1, 3 or 4, H, W)."""
    pixels_BCHW = _pixels_of(image.image).permute(2, 0, 1)[None]
    if image.factor == 1:
        return interpolate(pixels_BCHW, size, mode=interpolation, antialias=True)
    # The last row and column may lie beyond the full image, so the scale is not that of the sizes.
    # The output's size is rounded down: a little more keeps it from being one too small.
    scales = [
        resized * image.factor / full * (1 + 1e-9)
        for resized, full in zip(size, reversed(image.size), strict=True)
    ]
    return interpolate(pixels_BCHW, scale_factor=scales, mode=interpolation, antialias=True)


def _overlap(length: int, target: int) -> tuple[slice, slice]:
    """Which part of a resized side is shown, and where in the input. Rounds as torchvision does."""
    if length < target:
        start = (target - length) // 2
        return slice(0, length), slice(start, start + length)
    start = round((length - target) / 2)
    return slice(start, start + target), slice(0, target)


def _pixels_of(image: Image.Image) -> Tensor:
    """The pixels of an RGB image: (H, W, 4) uint8 in its memory where that is in one piece, else a
    copy (H, W, 3)."""
    try:
        values = pa.array(image).flatten()
    except ValueError:  # Pillow divides large images into blocks
        return torch.from_numpy(np.array(image))
    pixels_HWC: Tensor = from_dlpack(values).view(image.height, image.width, 4)
    return pixels_HWC
