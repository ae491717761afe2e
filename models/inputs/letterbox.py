"""Letterboxing: the whole image, scaled to fit, centred on black."""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from PIL import Image

# Images are already spread over threads; OpenCV's own would only get in their way.
cv2.setNumThreads(1)


def letterbox(width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Where a (width, height) image lies in a box of `size` (height, width): left, top, right and
    bottom, in the box's pixels."""
    box_height, box_width = size
    scale = min(box_height / height, box_width / width)
    scaled_width = min(box_width, max(1, round(width * scale)))
    scaled_height = min(box_height, max(1, round(height * scale)))
    left = (box_width - scaled_width) // 2
    top = (box_height - scaled_height) // 2
    return left, top, left + scaled_width, top + scaled_height


def create_letterbox_transform(size: tuple[int, int]) -> Callable[[Image.Image], torch.Tensor]:
    """Build the transform: RGB image to (3, height, width) uint8, by OpenCV's area resize."""
    height, width = size

    def transform(image: Image.Image) -> torch.Tensor:
        left, top, right, bottom = letterbox(*image.size, size)
        canvas_HWC = np.zeros((height, width, 3), np.uint8)
        canvas_HWC[top:bottom, left:right] = cv2.resize(
            np.asarray(image), (right - left, bottom - top), interpolation=cv2.INTER_AREA
        )
        return torch.from_numpy(canvas_HWC).permute(2, 0, 1)

    return transform
