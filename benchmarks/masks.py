"""Class logits to a mask of the image's size, in tiles or whole: `python -m benchmarks.masks`.

Both take turns for several rounds, on smooth and on mixed logits of 150 classes. Resizing whole
logits takes 4 bytes per class and pixel, and is measured only where that fits. Prints medians.
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
            methods: dict[str, Callable[..., np.ndarray]] = {"tiles": tiles}
            if size[0] < 2000:
                methods["whole"] = whole
            durations: dict[str, list[float]] = {method: [] for method in methods}
            for _ in range(ROUNDS):
                for method, work in methods.items():
                    started = time.perf_counter()
                    work(logits, size)
                    durations[method].append(time.perf_counter() - started)
            medians = {method: statistics.median(times) for method, times in durations.items()}
            figures = ", ".join(f"{method} {seconds:.2f} s" for method, seconds in medians.items())
            if "whole" in medians:
                figures += f"; ratio {medians['tiles'] / medians['whole']:.2f}"
            print(f"{name} logits, {size[0]}x{size[1]}: {figures}")


def tiles(logits_Khw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The server's method."""
    return label_map(logits_Khw, (0, 0, *size), size)


def whole(logits_Khw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes the logits of all classes, then takes the best class."""
    resized = interpolate(
        torch.from_numpy(logits_Khw)[None], size=size[::-1], mode="bilinear", align_corners=False
    )
    best: np.ndarray = resized[0].argmax(0).to(torch.uint8).numpy()
    return best


if __name__ == "__main__":
    main()
