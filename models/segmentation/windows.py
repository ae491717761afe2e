"""Sliding windows over images of any size, as in mmsegmentation's test pipeline.

An image is resized to fit a scale, keeping its aspect ratio. The network sees the whole image, or
windows at a stride, of which the last are shifted back inside. Logits of overlapping windows are
averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.segmentation.decoders.layers import resize

CLASSES_AT_ONCE = 16
MAX_PIXELS = 4096 * 1024
# Of an input with its padding, which the file's settings determine.
MAX_PADDED_PIXELS = 4 * MAX_PIXELS
MAX_WINDOWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How an image is resized and cut.

    Args:
        scale: pixels that the longer and the shorter side must fit in.
        crop: (height, width) of a window; None for the whole image.
        stride: (down, across) pixels between windows.
        pads: whether an input that is smaller than `crop` is padded to it, for trunks of one input
            size; otherwise its windows are smaller.
        keep_ratio: whether an image keeps its aspect ratio; otherwise it is resized to `scale`,
            which is (width, height) then.
        min_side: the least side of an input that is not padded to `crop`.
        multiple: sides of an input are padded to multiples of this.
        fill: (R, G, B) of the padding.
    """

    scale: tuple[int, int]
    crop: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    pads: bool = True
    keep_ratio: bool = True
    min_side: int = 32
    multiple: int = 1
    fill: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a size is below 1, or the windows are too large or too many.
        """
        longer, shorter = max(self.scale), min(self.scale)
        sizes = (shorter, *(self.crop or ()), *self.stride, self.min_side, self.multiple)
        if min(sizes) < 1 or longer * shorter > MAX_PIXELS:
            raise ValueError(
                f"sizes must be 1 or more and the scale at most {MAX_PIXELS} pixels; the scale is "
                f"{self.scale}, the stride {self.stride}"
            )
        for sides in ((longer, shorter), (shorter, longer)):
            width, height = self.padded(*sides)
            if width * height > MAX_PADDED_PIXELS:
                raise ValueError(
                    f"inputs would be padded to {width} x {height}; the limit is "
                    f"{MAX_PADDED_PIXELS} pixels"
                )
        if self._box_count(*self.padded(longer, shorter)) > MAX_WINDOWS:
            raise ValueError(f"more than {MAX_WINDOWS} windows; raise stride or reduce scale")

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) that an image is resized to."""
        if not self.keep_ratio:
            return self.scale
        longer, shorter = max(self.scale), min(self.scale)
        factor = min(longer / max(width, height), shorter / min(width, height))
        return max(1, int(width * factor + 0.5)), max(1, int(height * factor + 0.5))

    def padded(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) of the input, after padding at the bottom and on the right."""
        least = (self.min_side, self.min_side)
        rows, columns = self.crop if self.crop is not None and self.pads else least
        sides = max(width, columns), max(height, rows)
        across, down = (-(-side // self.multiple) * self.multiple for side in sides)
        return across, down

    def boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """The windows of an input of that size: top, left, bottom, right."""
        if self.crop is None:
            return [(0, 0, height, width)]
        rows, columns = min(self.crop[0], height), min(self.crop[1], width)
        return [
            (top, left, top + rows, left + columns)
            for top in _starts(height, rows, self.stride[0])
            for left in _starts(width, columns, self.stride[1])
        ]

    def _box_count(self, width: int, height: int) -> int:
        """The number of windows, without making them."""
        if self.crop is None:
            return 1
        rows, columns = min(self.crop[0], height), min(self.crop[1], width)
        down, across = self.stride
        return _start_count(height, rows, down) * _start_count(width, columns, across)

    def cut(self, image: Image.Image) -> list[Tensor]:
        """The windows of an RGB image, uint8 (3, h, w) each."""
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
        """The resized image's maps (K, h, w), float32, from those of its windows, by name.

        Computed for CLASSES_AT_ONCE classes at a time, to bound the memory.

        Args:
            rows: each window's maps (K, h', w').
            size: (width, height) of the image before resizing.
        """
        return {name: self._merge([row[name] for row in rows], size) for name in rows[0]}

    def _merge(self, maps: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
        width, height = self.resized(*size)
        across, down = self.padded(width, height)
        boxes = self.boxes(across, down)
        classes = len(maps[0])
        merged = np.empty((classes, height, width), np.float32)
        counts = np.zeros((down, across), np.float32)
        for top, left, bottom, right in boxes:
            counts[top:bottom, left:right] += 1
        for start in range(0, classes, CLASSES_AT_ONCE):
            chunk = slice(start, min(classes, start + CLASSES_AT_ONCE))
            total = np.zeros((chunk.stop - start, down, across), np.float32)
            for whole, (top, left, bottom, right) in zip(maps, boxes, strict=True):
                logits = torch.from_numpy(whole[chunk])[None]
                window = resize(logits, (bottom - top, right - left))[0]
                total[:, top:bottom, left:right] += window.numpy()
            merged[chunk] = (total / counts)[:, :height, :width]
        return merged


def _starts(length: int, window: int, stride: int) -> list[int]:
    count = _start_count(length, window, stride)
    return [min(i * stride, length - window) for i in range(count)]


def _start_count(length: int, window: int, stride: int) -> int:
    return max(length - window + stride - 1, 0) // stride + 1


def sliding_logits(pixels_BCHW: Tensor, windows: Windows, logits_of: Any) -> Tensor:
    """Logits (B, K, H, W) of an input that is already resized, averaged over its windows.

    Args:
        logits_of: a batch of windows (B, 3, h, w) to logits (B, K, h', w').
    """
    height, width = pixels_BCHW.shape[2:]
    total, counts = None, pixels_BCHW.new_zeros(height, width)
    for top, left, bottom, right in windows.boxes(width, height):
        logits = logits_of(pixels_BCHW[:, :, top:bottom, left:right])
        logits = resize(logits, (bottom - top, right - left))
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], height, width)
        total[:, :, top:bottom, left:right] += logits
        counts[top:bottom, left:right] += 1
    assert total is not None
    return total / counts
