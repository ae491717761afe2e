"""Class logits at a model's resolution to a mask of the image's own.

Tile by tile, and for each only of the classes that could win there, so that many classes and a
large image fit into memory."""

from collections.abc import Sequence

import numpy as np

TILE = 64
UNLABELLED = 255

# Left, top, right, bottom of what a map shows, in the image's pixels.
Region = Sequence[float]


def label_map(
    logits_Khw: np.ndarray,
    region: Region,
    size: tuple[int, int],
    threshold: float | None = None,
    *,
    softmax: bool = True,
) -> np.ndarray:
    """(H, W) numbers of the best classes, where the logits are resized bilinearly; uint8, or uint16
    of more than 255 classes.

    Args:
        region: beyond it nothing is known: UNLABELLED, or the last uint16.
        size: (W, H).
        threshold: classes of less probability are left UNLABELLED, too.
        softmax: what makes probabilities of the logits; false where they are such already.
    """
    width, height = size
    left, top, right, bottom = region
    none = unlabelled(len(logits_Khw))
    result = np.full((height, width), none, np.uint8 if none == UNLABELLED else np.uint16)
    columns = _Axis(width, left, right, logits_Khw.shape[2])
    rows = _Axis(height, top, bottom, logits_Khw.shape[1])
    for y in range(rows.first, rows.last, TILE):
        down = slice(y, min(rows.last, y + TILE))
        for x in range(columns.first, columns.last, TILE):
            across = slice(x, min(columns.last, x + TILE))
            near = logits_Khw[:, rows.cells(down), columns.cells(across)]
            best = _best(near, rows, columns, down, across, threshold, softmax)
            result[down, across] = np.where(best < 0, none, best)
    return result


def unlabelled(classes: int) -> int:
    """The number that stands for no class."""
    return UNLABELLED if classes <= UNLABELLED else 2**16 - 1


class _Axis:
    """Where an output's pixels lie between a map's cells, as bilinear resizing without aligned
    corners has it; cells at the border reach outwards."""

    def __init__(self, length: int, start: float, end: float, cells: int) -> None:
        self.first = max(0, int(np.floor(start)))
        self.last = min(length, int(np.ceil(end)))
        place = (np.arange(length) + 0.5 - start) * cells / (end - start) - 0.5
        place = np.clip(place, 0, cells - 1)
        self.low = np.minimum(place.astype(np.int64), max(0, cells - 2))
        self.share = (place - self.low).astype(np.float32)
        self.step = int(cells > 1)

    def cells(self, pixels: slice) -> slice:
        low = self.low[pixels]
        return slice(int(low[0]), int(low[-1]) + 1 + self.step)

    def mix(self, pixels: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each pixel the two cells it lies between, counted from `cells`, and how far."""
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
    """The best classes of a tile, -1 where none is good enough."""
    if threshold is None or not softmax:
        # a mean of cells is within their range: who is below another's least cannot win
        flat = near_Khw.reshape(len(near_Khw), -1)
        able = np.flatnonzero(flat.max(1) >= flat.min(1).max())
    else:
        able = np.arange(len(near_Khw))
    above, below, share_y = rows.mix(down)
    before, after, share_x = columns.mix(across)
    best = np.full((len(above), len(before)), -np.inf, np.float32)
    total = np.zeros_like(best)  # the sum of exponents, relative to the best so far
    winner = np.zeros(best.shape, np.int64)
    for number in able:
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
