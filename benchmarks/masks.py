"""Class logits to a mask of the image's own size: by tiles, against resizing everything.

`python -m benchmarks.masks`: medians of rounds in which both take turns, on smooth and on mixed
logits of 150 classes; the whole only where it fits, its memory being 4 bytes a class and pixel.
"""

import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from models.segmentation.resample import label_map

CLASSES = 150
RESIZED = (683, 512)
ROUNDS = 5


def main() -> None:
    random = np.random.default_rng(0)
    for name, cells in (("smooth", (6, 8)), ("mixed", (24, 32))):
        coarse = random.normal(size=(CLASSES, *cells)).astype(np.float32) * 3
        logits = np.stack([cv2.resize(each, RESIZED) for each in coarse])
        for size in ((1000, 750), (4000, 3000)):
            ways: dict[str, Callable[..., np.ndarray]] = {"tiles": tiles}
            if size[0] < 2000:
                ways["whole"] = whole
            taken: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(ROUNDS):
                for way, work in ways.items():
                    started = time.perf_counter()
                    work(logits, size)
                    taken[way].append(time.perf_counter() - started)
            medians = {way: statistics.median(times) for way, times in taken.items()}
            shown = ", ".join(f"{way} {seconds:.2f} s" for way, seconds in medians.items())
            ratio = f"; ratio {medians['tiles'] / medians['whole']:.2f}" if "whole" in ways else ""
            print(f"{name} logits, {size[0]}x{size[1]}: {shown}{ratio}")


def tiles(logits_Khw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """As the server does it."""
    return label_map(logits_Khw, (0, 0, *size), size)


def whole(logits_Khw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """All classes resized, then the best."""
    resized = interpolate(
        torch.from_numpy(logits_Khw)[None], size=size[::-1], mode="bilinear", align_corners=False
    )
    best: np.ndarray = resized[0].argmax(0).to(torch.uint8).numpy()
    return best


if __name__ == "__main__":
    main()
