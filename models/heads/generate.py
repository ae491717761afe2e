"""Images that a generator draws."""

import io
from collections.abc import Mapping

import numpy as np
from PIL import Image
from torch import Tensor

from models.heads.base import BaseHead
from models.trunks.base import TrunkOutput


class Generate(BaseHead):
    task = "generate"
    finish_is_slow = True

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        return {"image": output.features}

    def finish(self, row: Mapping[str, np.ndarray], size: tuple[int, int]) -> dict[str, np.ndarray]:
        """`size` (2,) width and height; `png` the image, values beyond 0..1 cut off."""
        image = Image.fromarray(to_pixels(row["image"]))
        return {"size": np.array(image.size), "png": encode_png(image)}


def to_pixels(image_CHW: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 of values within 0..1."""
    scaled = np.rint(np.clip(image_CHW, 0, 1) * 255)
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(1, 2, 0))


def encode_png(image: Image.Image) -> np.ndarray:
    """The PNG's bytes, (N,) uint8."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)
