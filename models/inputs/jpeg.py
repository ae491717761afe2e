"""JPEG files decoded by libjpeg-turbo into memory that is laid out as Pillow's images are.

Pillow contains the same library, but reads the file in blocks and converts each row. Only the kinds
of files are decoded here whose pixels equal Pillow's; the rest is left to Pillow.
"""

from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import simplejpeg
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

# How stored pixels become upright, by EXIF's orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = {UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}
# Where libjpeg-turbo scales with SIMD code. Other fractions take longer than the whole image.
FACTORS = (8, 4, 2)
# Adobe's marker for components in YCbCr.
YCBCR = 1


@dataclass(frozen=True, slots=True)
class JpegPixels:
    """A decoded JPEG file.

    Args:
        pixels_HWC: (H, W, 4) uint8, RGB and padding, as Pillow lays out RGB.
        transposition: how they become upright; None if they are.
        factor: by how much they are reduced.
        size: the full (width, height), upright.
    """

    pixels_HWC: np.ndarray
    transposition: Image.Transpose | None
    factor: int
    size: tuple[int, int]


def jpeg_pixels(
    header: Image.Image,
    data: bytes,
    min_side: int | None = None,
    buffer: memoryview | None = None,
) -> JpegPixels | None:
    """Decode a JPEG file.

    Args:
        header: the file, opened by Pillow and not loaded.
        data: the same file.
        min_side: decode at 1/8, 1/4 or 1/2 of the size, where the shorter side keeps at least that
            many pixels.
        buffer: memory for the pixels.

    Returns:
        None for files that Pillow must decode: other formats, CMYK, unusual sampling, and those
        with damaged data, about which Pillow decides.
    """
    if not is_common_jpeg(header):
        return None
    width, height = header.size
    factor = _factor(min(width, height), min_side)
    shape = (-(-height // factor), -(-width // factor), 4)
    try:
        pixels_HWC = simplejpeg.decode_jpeg(
            data,
            "RGBX",
            min_height=shape[0],
            min_width=shape[1],
            min_factor=factor,
            buffer=None if buffer is None else buffer[: shape[0] * shape[1] * shape[2]],
        )
    except ValueError:  # warnings about damaged or missing data included
        return None
    if pixels_HWC.shape != shape:
        return None
    transposition = transposition_of(header)
    return JpegPixels(pixels_HWC, transposition, factor, upright_size(header.size, transposition))


def transposition_of(header: Image.Image) -> Image.Transpose | None:
    """How the stored pixels become upright; None if they are."""
    return UPRIGHT.get(header.getexif().get(ExifTags.Base.Orientation, 1))


def upright_size(size: tuple[int, int], transposition: Image.Transpose | None) -> tuple[int, int]:
    """The (width, height) of an image that is stored in (width, height)."""
    width, height = size
    return (height, width) if transposition in QUARTER_TURNS else size


def is_common_jpeg(header: Image.Image) -> TypeGuard[JpegImageFile]:
    """Whether the file is a JPEG of 8-bit grey, or of YCbCr with 4:4:4, 4:2:2 or 4:2:0 sampling."""
    if not isinstance(header, JpegImageFile) or header.bits != 8:
        return False
    is_colour = get_sampling(header) >= 0 and header.info.get("adobe_transform", YCBCR) == YCBCR
    return header.layers == 1 or is_colour


def _factor(short_side: int, min_side: int | None) -> int:
    """The largest factor by which the shorter side may shrink; 1 for none."""
    if min_side is None:
        return 1
    return next((factor for factor in FACTORS if short_side >= factor * min_side), 1)
