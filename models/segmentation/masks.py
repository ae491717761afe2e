"""Encodings of segmentation masks: PNG, COCO RLE, polygons, overlays."""

import io
import json
from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco

from models.errors import InputError
from models.segmentation.polygons import polygons_by_class

Output = Literal["png", "rle", "polygons", "mask", "overlay"]

OVERLAY_SHARE = 0.55
# Rows of an overlay that are mixed at a time: numbers of eight bytes are made of their pixels.
OVERLAY_ROWS = 64


def encode_mask(
    mask_HW: np.ndarray,
    output: str,
    palette: Sequence[Sequence[int]],
    *,
    labels: Sequence[str],
    background: int,
    image: Image.Image | None = None,
) -> np.ndarray:
    """Encode an (H, W) mask of class numbers as uint8 bytes.

    Outputs:
        png: an indexed PNG with the palette.
        overlay: a PNG of `image` with the classes' colours over it.
        rle: JSON of COCO's compressed run-length encoding.
        polygons: JSON of GeoJSON's MultiPolygon coordinates in pixels, exterior ring first.
        mask: the mask itself, not encoded.

    JSON is a list with an entry (`index`, `label` and the encoding) per class in the mask. If the
    classes are background and foreground, it is the foreground's encoding alone.

    Args:
        output: one of the outputs above.
        palette: (R, G, B) of each class.
        background: the class number that is left out.
        image: the RGB image, which `overlay` requires.

    Raises:
        InputError: more classes than a PNG's palette can have, or polygons of too many corners.
    """
    if output == "mask":
        return mask_HW
    if output == "overlay":
        assert image is not None
        return _bytes_of(_png_of(_overlay(mask_HW, image, palette, background)))
    if output == "png":
        if mask_HW.dtype != np.uint8:
            raise InputError("a PNG holds 255 classes at most; use output=rle", field="output")
        return _bytes_of(_png(mask_HW, palette))
    is_binary = background == 0 and len(labels) == 2
    if output == "polygons":
        by_class = polygons_by_class(mask_HW, background)
    else:
        present = {1} if is_binary else set(np.unique(mask_HW).tolist()) - {background}
        by_class = {index: _rle(mask_HW == index) for index in present}
    if is_binary:
        return _bytes_of(by_class.get(1, b"[]"))
    entries = [
        b'{"index": %d, "label": %s, "%s": %s}'
        % (index, json.dumps(labels[index]).encode(), output.encode(), by_class[index])
        for index in sorted(by_class)
    ]
    return _bytes_of(b"[" + b", ".join(entries) + b"]")


def without_specks(mask_HW: np.ndarray, min_area: int, background: int) -> np.ndarray:
    """Replace 4-connected regions of fewer than `min_area` pixels by background."""
    cleaned = mask_HW.copy()
    for index in np.unique(mask_HW).tolist():
        if index == background:
            continue
        of_class = (mask_HW == index).astype(np.uint8)
        _, regions, stats, _ = cv2.connectedComponentsWithStats(of_class, connectivity=4)
        small = stats[:, cv2.CC_STAT_AREA] < min_area
        small[0] = False  # the pixels of other classes
        cleaned[small[regions]] = background
    return cleaned


def _bytes_of(content: bytes) -> np.ndarray:
    return np.frombuffer(content, dtype=np.uint8)


def _png(mask_HW: np.ndarray, palette: Sequence[Sequence[int]]) -> bytes:
    image = Image.fromarray(mask_HW)
    colours = [*palette, *[[0, 0, 0]] * (255 - len(palette)), [255, 255, 255]]
    image.putpalette([value for colour in colours[:256] for value in colour])
    return _png_of(image)


def _png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _overlay(
    mask_HW: np.ndarray, image: Image.Image, palette: Sequence[Sequence[int]], background: int
) -> Image.Image:
    """The image, greyed where there is background, blended with the classes' colours elsewhere."""
    pixels = np.asarray(image)
    result = np.empty_like(pixels)
    for start in range(0, len(pixels), OVERLAY_ROWS):
        rows = slice(start, start + OVERLAY_ROWS)
        result[rows] = _overlaid(mask_HW[rows], pixels[rows], palette, background)
    return Image.fromarray(result)


def _overlaid(
    mask_HW: np.ndarray,
    pixels_HWC: np.ndarray,
    palette: Sequence[Sequence[int]],
    background: int,
) -> np.ndarray:
    result = (pixels_HWC // 2 + 96).astype(np.uint8)
    for index in np.unique(mask_HW).tolist():
        if index != background:
            place = mask_HW == index
            colour = np.array(palette[index], np.float32)
            mixed = pixels_HWC[place] * (1 - OVERLAY_SHARE) + colour * OVERLAY_SHARE
            result[place] = mixed.astype(np.uint8)
    return result


def _rle(place_HW: np.ndarray) -> bytes:
    encoded = coco.encode(np.asfortranarray(place_HW, dtype=np.uint8))
    size = [int(n) for n in encoded["size"]]
    return json.dumps({"size": size, "counts": encoded["counts"].decode()}).encode()
