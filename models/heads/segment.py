"""What heads for segmentation share: maps in, a mask of the image's own size out."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

from models.errors import InputError
from models.heads.base import BaseHead
from models.segmentation.label_sets import palette_of
from models.segmentation.masks import encode_mask, without_specks
from models.segmentation.resample import Region, label_map, unlabelled
from models.tasks.rendering import npy
from models.trunks.base import Trunk

BINARY = ("background", "foreground")
FOREGROUND = ((0, 0, 0), (255, 255, 255))
OVERLAY = ((0, 0, 0), (255, 96, 0))
# An answer holds those of many images.
MAX_LOGITS = 16 * 2**20


class Segment(BaseHead):
    """A subclass gives `forward`, and in `map_of` what of a row is the map: one of probabilities
    (h, w) for a foreground, or (K, h, w) logits of as many classes."""

    task = "segment"
    finish_is_slow = True
    softmax = True  # what makes probabilities of the map's classes

    def __init__(
        self,
        trunk: Trunk,
        labels: Sequence[str],
        palette: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.trunk = trunk
        self.labels = tuple(labels)
        self.palette = palette or palette_of(labels)

    def check(self, options: Mapping[str, Any]) -> None:
        for name in ("labels", "templates"):
            if name in options:
                raise InputError(
                    f"this model is not prompted by texts; leave {name} out", field=name
                )

    def sees_image(self, options: Mapping[str, Any]) -> bool:
        return options.get("output") == "overlay"

    def map_of(self, row: Mapping[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
        """The map that a row of `forward`, or what its view has merged, holds; `size` is the
        image's (width, height)."""
        return row["logits"]

    def region(self, size: tuple[int, int]) -> Region:
        """What of an image of (width, height) the map shows, in the image's pixels."""
        if self.view is not None:
            return 0, 0, *size
        region: Region = self.trunk.preprocess.region(*size)
        return region

    def finish(
        self,
        row: Mapping[str, np.ndarray],
        size: tuple[int, int],
        *,
        threshold: float | None = None,
        min_area: int = 0,
        output: str = "png",
        image: Image.Image | None = None,
    ) -> dict[str, np.ndarray]:
        """`size` (2,) width and height; `index`, `label` and `pixels` (k,) of the classes that are
        there, of two always both; and the mask as `output`.

        Args:
            threshold: of the foreground's probability (0.5), or of the best class's (none).
            min_area: smaller regions, in pixels, become background.
        """
        found = self.map_of(row, size)
        labels, palette = self.labels, self.palette
        return self.answer(found, labels, palette, size, threshold, min_area, output, image)

    def answer(
        self,
        found: np.ndarray,
        labels: Sequence[str],
        palette: Sequence[Sequence[int]],
        size: tuple[int, int],
        threshold: float | None,
        min_area: int,
        output: str,
        image: Image.Image | None,
    ) -> dict[str, np.ndarray]:
        """`finish`, for these labels."""
        region = self.region(size)
        if found.ndim == 2:
            background = 0
            # a foreground by itself, against what is just as likely as not
            level = 0.5 if threshold is None else threshold
            mask_HW = foreground_mask(found, region, size, level)
            palette = OVERLAY if output == "overlay" else FOREGROUND
        else:
            background = unlabelled(len(labels))
            mask_HW = label_map(found, region, size, threshold, softmax=self.softmax)
        if min_area > 1:
            mask_HW = without_specks(mask_HW, min_area, background)
        counts = np.bincount(mask_HW.ravel(), minlength=len(labels))
        index = np.arange(2) if found.ndim == 2 else np.flatnonzero(counts)
        names = [labels[i] if i < len(labels) else "unlabelled" for i in index.tolist()]
        encoded = (
            npy(reduced(found[None] if found.ndim == 2 else found).astype("<f4"))
            if output == "logits"
            else encode_mask(
                mask_HW, output, palette, labels=labels, background=background, image=image
            )
        )
        return {
            "size": np.array(size),
            "index": index,
            "label": np.array(names),
            "pixels": counts[index],
            output: encoded,
        }


def foreground_mask(
    map_hw: np.ndarray, region: Region, size: tuple[int, int], threshold: float
) -> np.ndarray:
    """(H, W) uint8, 1 where a map of probabilities, brought to the image's size, is above the
    threshold."""
    # of two classes, one of which is the threshold itself everywhere
    level = np.full_like(map_hw, threshold)
    mask_HW = label_map(np.stack([level, map_hw]), region, size)
    above: np.ndarray = (mask_HW == 1).astype(np.uint8)
    return above


def reduced(maps_Khw: np.ndarray) -> np.ndarray:
    """The maps, both sides halved by averaging until they have no more than MAX_LOGITS bytes."""
    while maps_Khw.nbytes > MAX_LOGITS and min(maps_Khw.shape[1:]) > 1:
        size = (maps_Khw.shape[2] // 2, maps_Khw.shape[1] // 2)
        halved = [cv2.resize(each, size, interpolation=cv2.INTER_AREA) for each in maps_Khw]
        maps_Khw = np.stack(halved)
    return maps_Khw
