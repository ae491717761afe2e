"""Class logits at a model's resolution to a mask at the image's resolution.

Logits are resized tile by tile, and only those of classes that can win in a tile, so that large
images and many classes fit into memory.
"""

from collections.abc import Sequence

import numpy as np

TILE = 64
UNLABELLED = 255

# The part of the image that a map covers: left, top, right, bottom in pixels.
Region = Sequence[float]


def label_map(
    logits_Khw: np.ndarray,
    region: Region,
    size: tuple[int, int],
    threshold: float | None = None,
    *,
    softmax: bool = True,
) -> np.ndarray:
    """The best class of each pixel, (H, W), after bilinear resizing of the logits.

    Returns uint8, or uint16 for more than 255 classes. Pixels without a class have the value
    `unlabelled(classes)`.

    Args:
        region: the part of the image that the logits cover; pixels outside have no class.
        size: (W, H) of the image.
        threshold: the least probability; pixels whose best class has less have no class.
        softmax: the logits become probabilities by a softmax; false if they are probabilities.
    """
    width, height = size
    left, top, right, bottom = region
    empty = unlabelled(len(logits_Khw))
    result = np.full((height, width), empty, np.uint8 if empty == UNLABELLED else np.uint16)
    columns = _Axis(width, left, right, logits_Khw.shape[2])
    rows = _Axis(height, top, bottom, logits_Khw.shape[1])
    for y in range(rows.first, rows.last, TILE):
        down = slice(y, min(rows.last, y + TILE))
        for x in range(columns.first, columns.last, TILE):
            across = slice(x, min(columns.last, x + TILE))
            near = logits_Khw[:, rows.cells(down), columns.cells(across)]
            best = _best(near, rows, columns, down, across, threshold, softmax)
            result[down, across] = np.where(best < 0, empty, best)
    return result


def unlabelled(classes: int) -> int:
    """The value of pixels without a class: 255, or 65535 for more than 255 classes."""
    return UNLABELLED if classes <= UNLABELLED else 2**16 - 1


class _Axis:
    """Bilinear weights along one axis, without aligned corners; border cells extend outwards."""

    def __init__(self, length: int, start: float, end: float, cells: int) -> None:
        self.first = max(0, int(np.floor(start)))
        self.last = min(length, int(np.ceil(end)))
        place = (np.arange(length) + 0.5 - start) * cells / (end - start) - 0.5
        place = np.clip(place, 0, cells - 1)
        self.low = np.minimum(place.astype(np.int64), max(0, cells - 2))
        self.share = (place - self.low).astype(np.float32)
        self.step = int(cells > 1)

    def cells(self, pixels: slice) -> slice:
        """The cells that these pixels are computed from."""
        low = self.low[pixels]
        return slice(int(low[0]), int(low[-1]) + 1 + self.step)

    def mix(self, pixels: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The two cells around each pixel, counted from `cells`, and the second one's weight."""
        low = self.low[pixels] - self.low[pixels][0]
        return low, low + self.step, self.share[pixels]


def _best(
    near_Khw: np.ndarray,
    rows: _Axis,
    columns: _Axis,
    down: slice,
    across: slice,
    threshold: float | None,
    softmax: bool,
) -> np.ndarray:
    """The best classes of a tile, -1 where none reaches the threshold."""
    if threshold is None or not softmax:
        # a mean of cells lies in their range: a class below another's minimum cannot win
        flat = near_Khw.reshape(len(near_Khw), -1)
        candidates = np.flatnonzero(flat.max(1) >= flat.min(1).max())
    else:
        candidates = np.arange(len(near_Khw))
    above, below, share_y = rows.mix(down)
    before, after, share_x = columns.mix(across)
    best = np.full((len(above), len(before)), -np.inf, np.float32)
    total = np.zeros_like(best)  # the softmax's denominator, relative to the best so far
    winner = np.zeros(best.shape, np.int64)
    for number in candidates:
        map_hw = near_Khw[number]
        lines = map_hw[above] * (1 - share_y[:, None]) + map_hw[below] * share_y[:, None]
        value = lines[:, before] * (1 - share_x) + lines[:, after] * share_x
        winner[value > best] = number
        if threshold is not None and softmax:
            leading = np.maximum(best, value)
            total = total * np.exp(best - leading) + np.exp(value - leading)
        best = np.maximum(best, value)
    if threshold is not None:
        winner[(1 / total if softmax else best) < threshold] = -1
    return winner
