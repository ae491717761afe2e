"""Pillow images that use the memory of decoded pixels, without a copy."""

import numpy as np
import pyarrow as pa
from PIL import Image


def image_from(pixels_HWC: np.ndarray, transposition: Image.Transpose | None = None) -> Image.Image:
    """An RGB image that uses the memory of (H, W, 4) uint8 pixels, as Pillow lays out RGB.

    Args:
        transposition: is applied to the image, which then has memory of its own.
    """
    height, width, channels = pixels_HWC.shape
    values = pa.array(pixels_HWC.reshape(-1))
    pixels = pa.FixedSizeListArray.from_arrays(values, channels)
    image = Image.fromarrow(pixels, "RGB", (width, height))
    return image if transposition is None else image.transpose(transposition)
