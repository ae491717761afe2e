"""Encodings of segmentation masks: PNG, COCO RLE, polygons, overlays."""

import io
import json
from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco
from rasterio.features import shapes

from models.errors import InputError

Output = Literal["png", "rle", "polygons", "mask", "overlay"]

OVERLAY_SHARE = 0.55


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
        InputError: more classes than a PNG's palette can have.
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
    encode = _rle if output == "rle" else _polygons
    if background == 0 and len(labels) == 2:
        return _bytes_of(json.dumps(encode(mask_HW != 0)).encode())
    key = "rle" if output == "rle" else "polygons"
    entries = [
        {"index": index, "label": labels[index], key: encode(mask_HW == index)}
        for index in np.unique(mask_HW).tolist()
        if index != background
    ]
    return _bytes_of(json.dumps(entries).encode())


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
    result = (pixels // 2 + 96).astype(np.uint8)
    for index in np.unique(mask_HW).tolist():
        if index != background:
            place = mask_HW == index
            colour = np.array(palette[index], np.float32)
            mixed = pixels[place] * (1 - OVERLAY_SHARE) + colour * OVERLAY_SHARE
            result[place] = mixed.astype(np.uint8)
    return Image.fromarray(result)


def _rle(place_HW: np.ndarray) -> dict[str, Any]:
    encoded = coco.encode(np.asfortranarray(place_HW, dtype=np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode()}


def _polygons(place_HW: np.ndarray) -> list[Any]:
    # 4-connected outlines along pixel edges never touch themselves, so each polygon is valid
    outlines = shapes(place_HW.astype(np.uint8), mask=place_HW, connectivity=4)
    return [geometry["coordinates"] for geometry, _ in outlines]
