"""The transform `gpu`: resize and crop in float32 by torch, on the device that the pixels are on.

On CPUs it transforms what no GPU decodes. Like Pillow it rounds to levels after each of the two
directions. Pillow's weights are whole numbers, so a few values differ, by up to two levels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from models.inputs.crop_transform import overlap
from models.inputs.images import sliver_ends

# Pixels on each side of a filter's centre.
SUPPORT = {"bicubic": 2, "bilinear": 1}
# torch's CUDA kernel keeps float32 numbers in the shared memory of a block: the weights of 32
# columns and of a row, and 32 sums for each weight of the row. It raises if they exceed 48 KiB.
# Source: aten/src/ATen/native/cuda/UpSampleBilinear2d.cu, upsample_gen2d_aa_out_cuda_template.
BLOCK_COLUMNS = 32
BLOCK_NUMBERS = 48 * 1024 // 4


@dataclass(frozen=True, slots=True)
class TensorTransform:
    """The transform of one trunk.

    Args:
        input_size, interpolation, fill, resized, early: as for `create_crop_transform`.
        max_ratio: longer images lose their ends, see `cut_sliver`; None for none.
    """

    input_size: tuple[int, int]
    interpolation: str
    fill: tuple[int, int, int]
    resized: Callable[[int, int], tuple[int, int]]
    early: bool
    max_ratio: int | None

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image as uint8 (3, height, width), on the CPU."""
        window_CHW = torch.empty(3, *self.input_size)
        self.write(torch.from_numpy(np.array(image)).permute(2, 0, 1), window_CHW)
        return window_CHW.to(torch.uint8)

    def write(self, pixels_CHW: Tensor, window_CHW: Tensor) -> None:
        """Write what the input shows of an image, on the device of both.

        Args:
            pixels_CHW: upright, uint8, of one channel or three.
            window_CHW: (3, height, width) float32. Its values are whole numbers then.
        """
        from models.inputs.resample import rows_first  # compiles, which gateways do without

        height, width = pixels_CHW.shape[1:]
        across, down = self._ends(width, height)
        pixels_CHW = pixels_CHW[:, down : height - down, across : width - across]
        height, width = pixels_CHW.shape[1:]
        size = rows, columns = self.resized(width, height)
        between = (rows, width) if rows_first((height, width), size) else (height, columns)
        values_CHW = pixels_CHW.to(torch.float32, memory_format=torch.contiguous_format)
        resized_CHW = self._resize(self._resize(values_CHW, between), size)
        (shown_rows, top), (shown_columns, left) = (
            overlap(side, target, early=self.early)
            for side, target in zip(size, self.input_size, strict=True)
        )
        if size[0] < self.input_size[0] or size[1] < self.input_size[1]:
            for channel, level in zip(window_CHW, self.fill, strict=True):
                channel.fill_(level)
        window_CHW[:, top, left] = resized_CHW[:, slice(*shown_rows), slice(*shown_columns)]

    def _resize(self, values_CHW: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize to (height, width) and round, halves up as Pillow does."""
        resized = interpolate(values_CHW[None], size, mode=self.interpolation, antialias=True)[0]
        return resized.add_(0.5).floor_().clamp_(0, 255)

    def fits_gpu(self, width: int, height: int) -> bool:
        """Whether torch's CUDA kernel can resize an image of that size."""
        across, down = self._ends(width, height)
        width, height = width - 2 * across, height - 2 * down
        rows, columns = self.resized(width, height)
        steps = (
            (self._weights(width / columns), self._weights(1)),
            (self._weights(1), self._weights(height / rows)),
        )
        return all(
            BLOCK_COLUMNS * across + (BLOCK_COLUMNS + 1) * down <= BLOCK_NUMBERS
            for across, down in steps
        )

    def _ends(self, width: int, height: int) -> tuple[int, int]:
        return (0, 0) if self.max_ratio is None else sliver_ends((width, height), self.max_ratio)

    def _weights(self, scale: float) -> int:
        """The weights that the kernel keeps for a pixel in one direction."""
        return 1 + 2 * math.ceil(SUPPORT[self.interpolation] * max(1.0, scale))
