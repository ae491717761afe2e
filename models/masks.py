"""Segmentation masks in the forms that clients ask for: PNG, COCO RLE, polygons."""

import io
import json
from typing import Any, Literal

import numpy as np
from PIL import Image
from pycocotools import mask as coco
from rasterio.features import shapes

Output = Literal["png", "rle", "polygons", "mask"]


def encode_mask(mask_HW: np.ndarray, output: str, palette: list[int]) -> np.ndarray:
    """Encode an (H, W) uint8 mask of class indices, 0 being background, as uint8 bytes; `mask`
    is the mask itself, as it came.

    `png` is an indexed PNG; `rle` and `polygons` are JSON, one object for a mask with a single
    foreground class. RLE is COCO's compressed form; polygons are GeoJSON's MultiPolygon
    coordinates in pixels: exterior ring first, then holes.
    """
    if output == "mask":
        return mask_HW
    if output == "png":
        return np.frombuffer(_png(mask_HW, palette), dtype=np.uint8)
    encoded = _rle(mask_HW) if output == "rle" else _polygons(mask_HW)
    return np.frombuffer(json.dumps(encoded).encode(), dtype=np.uint8)


def _png(mask_HW: np.ndarray, palette: list[int]) -> bytes:
    image = Image.fromarray(mask_HW)
    image.putpalette(palette)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _rle(mask_HW: np.ndarray) -> dict[str, Any]:
    encoded = coco.encode(np.asfortranarray(mask_HW != 0, dtype=np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode()}


def _polygons(mask_HW: np.ndarray) -> list[Any]:
    foreground = (mask_HW != 0).astype(np.uint8)
    # 4-connected outlines along pixel edges never touch themselves, so each polygon is valid
    found = shapes(foreground, mask=foreground.astype(bool), connectivity=4)
    return [geometry["coordinates"] for geometry, _ in found]
