"""Pillow's antialiased resize of 8-bit pixels, bit for bit, for a window of the result alone.

Pillow weighs columns and rows one after the other, in fixed point (src/libImaging/Resample.c). The
sums here are the same, but run along memory, which compiles to SIMD instructions: columns are
weighed as the rows of transposed pixels. benchmarks/decoding.py has what that saves.

Importing this module compiles two functions, which takes about a second.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numba import njit, types

# Bits after the point of a weight, in Pillow.
PRECISION = 22
# How far a filter reaches on either side, in pixels of the smaller image.
SUPPORT = {"bilinear": 1, "bicubic": 2}
# Pixels that are transposed at a time, so that they stay in the processor's cache.
BLOCK_PIXELS = 2**16

READ_ONLY = types.Array(types.u1, 2, "C", readonly=True)


@dataclass(frozen=True, slots=True)
class Taps:
    """What each pixel of one side of the result is made of.

    Args:
        resized: pixels of the whole resized side, of which these are a window.
        first: (N,) int64, the first source pixel of each.
        counts: (N,) int64, the number of source pixels of each.
        weights: (N, K) int32 in fixed point, of which the first `counts` are used.
    """

    resized: int
    first: np.ndarray
    counts: np.ndarray
    weights: np.ndarray

    @property
    def source(self) -> slice:
        """The source pixels that are used."""
        return slice(int(self.first[0]), int(self.first[-1] + self.counts[-1]))


@lru_cache(maxsize=128)  # at most 300 KB each
def taps(
    length: int, resized: int, window: tuple[int, int], interpolation: str, covered: float
) -> Taps:
    """The taps for one side of an image.

    Args:
        length: pixels of that side.
        resized: pixels of the resized side.
        window: which pixels of the resized side are wanted: the first one, and the one past the
            last one.
        interpolation: `bilinear` or `bicubic`.
        covered: how many of the `length` pixels the resized side covers; less than all of them
            where the last one lies partly beyond the image.
    """
    start, stop = window
    scale = covered / resized
    support = SUPPORT[interpolation]
    size = math.ceil(support * max(scale, 1.0)) * 2 + 1
    first, counts = np.zeros(stop - start, np.int64), np.zeros(stop - start, np.int64)
    weights = np.zeros((stop - start, size), np.int32)
    _compute_taps(length, scale, start, support, first, counts, weights)
    return Taps(resized, first, counts, weights)


def resample(pixels_HWC: np.ndarray, rows: Taps, columns: Taps) -> np.ndarray:
    """Resize uint8 pixels (H, W, C) to a window: (len(rows.first), len(columns.first), C) uint8."""
    used_HWC = pixels_HWC[rows.source, columns.source]
    if rows_first(pixels_HWC.shape[:2], (rows.resized, columns.resized)):
        return _weigh_columns(_weigh(np.ascontiguousarray(used_HWC), rows), columns)
    return _weigh(_weigh_columns(used_HWC, columns), rows)


def rows_first(size: tuple[int, ...], resized: tuple[int, int]) -> bool:
    """Whether Pillow 13 weighs rows before columns. Between both, it rounds to 8 bits.

    Args:
        size, resized: (height, width) before and after.
    """
    fewer_rows, fewer_columns = size[0] - resized[0], size[1] - resized[1]
    return fewer_rows > 0 and fewer_rows > 2 * fewer_columns


def _weigh_columns(pixels_HWC: np.ndarray, columns: Taps) -> np.ndarray:
    """Weighted sums of columns: (H, W, C) uint8 to (H, len(columns.first), C)."""
    height, width, channels = pixels_HWC.shape
    result_HWC = np.empty((height, len(columns.first), channels), np.uint8)
    block = max(16, BLOCK_PIXELS // width)
    for top in range(0, height, block):
        sums_WHC = _weigh(cv2.transpose(pixels_HWC[top : top + block]), columns)
        cv2.transpose(sums_WHC, result_HWC[top : top + block])
    return result_HWC


def _weigh(pixels: np.ndarray, sums: Taps) -> np.ndarray:
    """Weighted sums of rows: (R, M, C) uint8 to (len(sums.first), M, C)."""
    count, across, channels = len(sums.first), *pixels.shape[1:]
    result = np.empty((count, across * channels), np.uint8)
    source = pixels.reshape(len(pixels), -1)
    _weigh_rows(source, sums.first - sums.source.start, sums.counts, sums.weights, result)
    return result.reshape(count, across, channels)


@njit(
    types.void(READ_ONLY, types.i8[::1], types.i8[::1], types.i4[:, ::1], types.u1[:, ::1]),
    nogil=True,
)
def _weigh_rows(
    source: np.ndarray,
    first: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
    result: np.ndarray,
) -> None:
    """Each row of `result` is a sum of rows of `source`, in int32 as Pillow's."""
    width = source.shape[1]
    sums = np.empty(width, np.int32)
    for row in range(result.shape[0]):
        begin, count = first[row], counts[row]
        sums[:] = 1 << (PRECISION - 1)  # a half, to round
        tap = 0
        while tap + 4 <= count:  # four at a time: the sums are read and written less often
            a, b, c, d = (
                source[begin + tap],
                source[begin + tap + 1],
                source[begin + tap + 2],
                source[begin + tap + 3],
            )
            p, q, r, s = (
                weights[row, tap],
                weights[row, tap + 1],
                weights[row, tap + 2],
                weights[row, tap + 3],
            )
            for x in range(width):
                sums[x] += (
                    np.int32(a[x]) * p
                    + np.int32(b[x]) * q
                    + np.int32(c[x]) * r
                    + np.int32(d[x]) * s
                )
            tap += 4
        while tap < count:
            a, p = source[begin + tap], weights[row, tap]
            for x in range(width):
                sums[x] += np.int32(a[x]) * p
            tap += 1
        for x in range(width):
            result[row, x] = min(max(sums[x] >> PRECISION, 0), 255)


@njit("void(i8, f8, i8, i8, i8[::1], i8[::1], i4[:,::1])", nogil=True)
def _compute_taps(
    length: int,
    scale: float,
    start: int,
    support: int,
    first: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Fill in the taps from `start` on, by the same steps in float64 as Pillow's."""
    stretch = max(scale, 1.0)
    reach = support * stretch
    narrowing = 1.0 / stretch
    exact = np.empty(weights.shape[1])
    for position in range(len(first)):
        centre = (start + position + 0.5) * scale
        begin = max(0, int(centre - reach + 0.5))
        count = min(length, int(centre + reach + 0.5)) - begin
        total = 0.0
        for tap in range(count):
            x = abs((tap + begin - centre + 0.5) * narrowing)
            if support == 1:
                weight = 1.0 - x if x < 1.0 else 0.0
            elif x < 1.0:
                weight = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
            else:
                weight = (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2.0 else 0.0
            exact[tap] = weight
            total += weight
        for tap in range(count):
            fixed = (exact[tap] / total if total != 0.0 else exact[tap]) * (1 << PRECISION)
            weights[position, tap] = int(fixed + 0.5) if fixed >= 0 else int(fixed - 0.5)
        first[position], counts[position] = begin, count
