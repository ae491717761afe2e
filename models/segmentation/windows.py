"""Images of any size for a trunk that wants crops: resized, and looked at window by window.

mmsegmentation's test pipeline: keep the ratio within a scale; then the whole image, or windows at a
stride, the last ones shifted back inside, their logits averaged where they overlap.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.segmentation.decoders import resize

CLASSES_AT_ONCE = 16
MAX_PIXELS = 4096 * 1024
MAX_WINDOWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """`scale`: what the longer and the shorter side must fit in. `crop` (height, width) and
    `stride` of the windows; None: the whole image, at least `min_side` pixels a side. `fill` is the
    colour of what the image does not cover."""

    scale: tuple[int, int]
    crop: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    min_side: int = 32
    multiple: int = 1
    fill: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: no windows, or more or larger ones than anybody means.
        """
        longer, shorter = max(self.scale), min(self.scale)
        sizes = (shorter, *(self.crop or ()), *self.stride, self.min_side, self.multiple)
        if min(sizes) < 1 or longer * shorter > MAX_PIXELS:
            raise ValueError(f"of {self.scale} pixels, or strides of {self.stride}")
        if len(self.boxes(*self.padded(longer, shorter))) > MAX_WINDOWS:
            raise ValueError(f"more than {MAX_WINDOWS} of them")

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) that an image is brought to."""
        longer, shorter = max(self.scale), min(self.scale)
        factor = min(longer / max(width, height), shorter / min(width, height))
        return max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5))

    def padded(self, width: int, height: int) -> tuple[int, int]:
        """What that is filled up to, below and to the right."""
        rows, columns = self.crop or (self.min_side, self.min_side)
        sides = max(width, columns), max(height, rows)
        across, down = (-(-side // self.multiple) * self.multiple for side in sides)
        return across, down

    def boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """Windows over an input of that size: top, left, bottom, right."""
        if self.crop is None:
            return [(0, 0, height, width)]
        return [
            (top, left, top + self.crop[0], left + self.crop[1])
            for top in _starts(height, self.crop[0], self.stride[0])
            for left in _starts(width, self.crop[1], self.stride[1])
        ]

    def cut(self, image: Image.Image) -> list[Tensor]:
        width, height = self.resized(*image.size)
        pixels_HWC = cv2.resize(np.asarray(image), (width, height), interpolation=cv2.INTER_LINEAR)
        across, down = self.padded(width, height)
        canvas = np.empty((down, across, 3), np.uint8)
        canvas[:] = self.fill
        canvas[:height, :width] = pixels_HWC
        pixels = torch.from_numpy(canvas).permute(2, 0, 1)
        return [
            pixels[:, top:bottom, left:right] for top, left, bottom, right in
            self.boxes(across, down)
        ]  # fmt: skip

    def merge(
        self, rows: Sequence[Mapping[str, np.ndarray]], size: tuple[int, int]
    ) -> dict[str, Any]:
        """`logits` (K, h, w) of the resized image, of the windows' (K, h', w'); a few classes at a
        time, so that no more than that is there twice."""
        width, height = self.resized(*size)
        across, down = self.padded(width, height)
        boxes = self.boxes(across, down)
        classes = len(rows[0]["logits"])
        merged = np.empty((classes, height, width), np.float32)
        counts = np.zeros((down, across), np.float32)
        for top, left, bottom, right in boxes:
            counts[top:bottom, left:right] += 1
        for start in range(0, classes, CLASSES_AT_ONCE):
            some = slice(start, min(classes, start + CLASSES_AT_ONCE))
            total = np.zeros((some.stop - start, down, across), np.float32)
            for row, (top, left, bottom, right) in zip(rows, boxes, strict=True):
                logits = torch.from_numpy(row["logits"][some])[None]
                window = resize(logits, (bottom - top, right - left))[0]
                total[:, top:bottom, left:right] += window.numpy()
            merged[some] = (total / counts)[:, :height, :width]
        return {"logits": merged}


def _starts(length: int, window: int, stride: int) -> list[int]:
    count = max(length - window + stride - 1, 0) // stride + 1
    return [min(i * stride, length - window) for i in range(count)]


def sliding_logits(pixels_BCHW: Tensor, windows: Windows, logits_of: Any) -> Tensor:
    """(B, K, H, W) logits of an input that is as large as it is to be: what `logits_of` a batch of
    windows gives, put together."""
    height, width = pixels_BCHW.shape[2:]
    total, counts = None, pixels_BCHW.new_zeros(height, width)
    for top, left, bottom, right in windows.boxes(width, height):
        found = logits_of(pixels_BCHW[:, :, top:bottom, left:right])
        found = resize(found, (bottom - top, right - left))
        if total is None:
            total = found.new_zeros(*found.shape[:2], height, width)
        total[:, :, top:bottom, left:right] += found
        counts[top:bottom, left:right] += 1
    assert total is not None
    return total / counts
