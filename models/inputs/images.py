"""Decoding of images to upright RGB. Limits are checked before pixels are decoded."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from models.errors import ImageTooLargeError, InputError
from models.inputs.canvas import canvas_size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

# Pillow's own check warns at one size and raises at twice that; `ImageLimits` are exact, per call.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """The largest image that is decoded.

    Args:
        max_bytes: encoded bytes.
        max_pixels: width times height.
        max_side: pixels of the longer side.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    max_side: int = 16_384


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True, slots=True)
class ReducedImage:
    """An image that may have been decoded at a fraction of its size.

    Args:
        image: upright, RGB.
        size: the full (width, height), upright.
        factor: pixels of the full image in each direction for one of `image`, whose last row and
            column may cover fewer.
    """

    image: Image.Image
    size: tuple[int, int]
    factor: int = 1


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode JPEG, PNG, WebP, GIF (first frame), BMP or TIFF to an RGB image, upright by EXIF.

    Alpha is composited on white; 16-bit greyscale keeps its upper eight bits. The pixels are those
    that Pillow decodes.

    Raises:
        ImageTooLargeError: the image is over a limit, by its header.
        InputError: the image is empty, truncated, damaged, or in another format.
    """
    return _decode(open_image(data, limits), data).image


def decode_reduced(data: bytes, limits: ImageLimits, min_side: int) -> ReducedImage:
    """Decode as `decode_image`, but JPEG at 1/8, 1/4 or 1/2 of the size where the shorter side
    keeps at least `min_side` pixels.

    Raises:
        ImageTooLargeError, InputError: as `decode_image`.
    """
    return _decode(open_image(data, limits), data, min_side)


def check_bytes(data: bytes, limits: ImageLimits) -> None:
    """Check the size of an encoded image.

    Raises:
        ImageTooLargeError, InputError: it is over the limit, or empty.
    """
    if not data:
        raise InputError("the image is empty (0 bytes)")
    if len(data) > limits.max_bytes:
        raise ImageTooLargeError(
            f"the image has {len(data)} bytes; the limit is {limits.max_bytes}"
        )


def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """The image with its header read and checked, and its pixels not decoded.

    Raises:
        ImageTooLargeError, InputError: as `decode_image`.
    """
    check_bytes(data, limits)
    if (size := canvas_size(data)) is not None:
        _check_size(size, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        served = f"a served format ({', '.join(FORMATS)})"
        if data[4:8] == b"ftyp":  # ISO/IEC 14496-12: what phones write, unless told otherwise
            detail = f"HEIC, AVIF and video files are not in {served}; send JPEG"
            raise InputError(detail) from error
        raise InputError(f"not an image in {served}") from error
    except Exception as error:  # Pillow's parsers raise many types on damaged headers
        raise InputError(f"the image's header cannot be read: {error}") from error
    _check_size(image.size, limits)
    return image


@contextmanager
def decoding_errors(header: Image.Image) -> Iterator[None]:
    """A context for decoding: damaged or truncated pixel data becomes an `InputError`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        raise InputError(f"the {header.format} image cannot be decoded: {error}") from error


def _decode(header: Image.Image, data: bytes, min_side: int | None = None) -> ReducedImage:
    # they load libraries that gateways do without
    from models.inputs.jpeg import jpeg_pixels
    from models.inputs.pixels import image_from

    with decoding_errors(header):
        if (jpeg := jpeg_pixels(header, data, min_side)) is not None:
            image = image_from(jpeg.pixels_HWC, jpeg.transposition)
            return ReducedImage(image, jpeg.size, jpeg.factor)
        header.load()
        image = to_upright_rgb(header)
        return ReducedImage(image, image.size)


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise InputError(f"the image has no pixels ({width}x{height})")
    if max(width, height) > limits.max_side:
        raise ImageTooLargeError(
            f"the image is {width}x{height}; the limit is {limits.max_side} pixels a side"
        )
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"the image is {width}x{height} = {width * height} pixels; "
            f"the limit is {limits.max_pixels}"
        )


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image as RGB: rotated by EXIF, alpha on white, 16 bits reduced to the upper 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # convert("RGB") clips values above 255 to white
        return Image.fromarray(_upper_byte(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _upper_byte(grey: np.ndarray) -> np.ndarray:
    """The upper byte of 16-bit values (H, W), in a 16- or 32-bit type, as uint8."""
    upper: np.ndarray = np.clip(grey, 0, 0xFFFF).astype(np.uint16) >> 8
    return upper.astype(np.uint8)


def cut_sliver(image: Image.Image | ReducedImage, max_ratio: int) -> Image.Image | ReducedImage:
    """Cut the far ends off a very long image, evenly, so that its centre stays where it is."""
    width, height = image.size
    factor = image.factor if isinstance(image, ReducedImage) else 1
    across, down = sliver_ends(image.size, max_ratio, factor)
    if across == down == 0:
        return image
    if isinstance(image, ReducedImage):
        box = (across, down, image.image.width - across, image.image.height - down)
        size = (width - 2 * across * factor, height - 2 * down * factor)
        return ReducedImage(image.image.crop(box), size, factor)
    return image.crop((across, down, width - across, height - down))


def sliver_ends(size: tuple[int, int], max_ratio: int, factor: int = 1) -> tuple[int, int]:
    """The columns on each side, and the rows above and below, that `cut_sliver` cuts off.

    Args:
        factor: by how much the pixels of an image of this (width, height) are reduced.
    """
    width, height = size
    short, long = sorted(size)
    excess = max(0, long - short * max_ratio) // 2 // factor
    return (excess, 0) if width > height else (0, excess)
