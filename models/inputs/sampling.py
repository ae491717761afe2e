"""TensorFlow's bilinear resize without antialiasing (`tf.image.resize`), as uint8.

Each pixel of the result is mixed of the four pixels around its centre, also where the image
shrinks. The steps are those of TensorFlow's kernel, in float32 and in its order. Code that casts
its result to uint8 rounds down; where it computes on in float32, rounding is off by half a step.
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from models.errors import CatalogError


def create_sampling_transform(
    size: tuple[int, int], steps: tuple[str, float, str], *, truncate: bool
) -> Callable[[Image.Image], torch.Tensor]:
    """Build the transform: RGB image to (3, height, width) uint8, squashed to `size`.

    Args:
        steps: crop mode, `crop_pct` and interpolation of the settings.
        truncate: round down, not to the nearest.

    Raises:
        CatalogError: they are not those of a bilinear squash.
    """
    if steps != ("squash", 1.0, "bilinear"):
        raise CatalogError(
            "antialias = false needs crop_mode = 'squash', crop_pct = 1.0 and interpolation = "
            "'bilinear'"
        )
    height, width = size

    def transform(image: Image.Image) -> torch.Tensor:
        pixels_HWC = np.asarray(image)
        above, below, down = _neighbours(pixels_HWC.shape[0], height)
        left, right, across = _neighbours(pixels_HWC.shape[1], width)
        across, down = across[:, None], down[:, None, None]

        def mixed(rows: np.ndarray) -> np.ndarray:
            first = pixels_HWC[np.ix_(rows, left)].astype(np.float32)
            mix: np.ndarray = first + (pixels_HWC[np.ix_(rows, right)] - first) * across
            return mix

        top = mixed(above)
        resized_HWC = top + (mixed(below) - top) * down
        if not truncate:
            np.rint(resized_HWC, out=resized_HWC)
        return torch.from_numpy(resized_HWC.astype(np.uint8)).permute(2, 0, 1)

    return transform


def _neighbours(length: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels of a side before and after each centre, int64, and how far it is between them."""
    scale = np.float32(length) / np.float32(count)
    centres = (np.arange(count, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floors = np.floor(centres)
    before = np.maximum(floors, 0).astype(np.int64)
    after = np.minimum(np.ceil(centres), length - 1).astype(np.int64)
    return before, after, centres - floors
