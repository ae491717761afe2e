"""What heads for segmentation share: maps in, a mask of the image's own size out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from PIL import Image

from models.errors import InputError
from models.heads.base import Head
from models.segmentation.label_sets import palette_of
from models.segmentation.masks import encode_mask, without_specks
from models.segmentation.resample import Region, label_map, unlabelled
from models.tasks.rendering import npy
from models.trunks.base import Trunk

BINARY = ("background", "foreground")
FOREGROUND = ((0, 0, 0), (255, 255, 255))
OVERLAY = ((0, 0, 0), (255, 96, 0))
# Bytes of an image's logits: an answer may hold those of many images.
MAX_LOGITS = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskOptions:
    """A caller's options for masks.

    Args:
        threshold: least probability of the foreground (0.5), or of the best class (none).
        min_area: regions of fewer pixels become background.
        output: the form, see `models/tasks/segment.py`.
    """

    threshold: float | None = None
    min_area: int = 0
    output: str = "png"


class Segment(Head):
    """A subclass has `forward`, and in `map_of` says which array of a row is the map: a
    foreground's probabilities (h, w), or logits of K classes (K, h, w)."""

    task = "segment"
    forward_is_slow = True
    finish_is_slow = True
    softmax = True  # whether a softmax turns the map's classes into probabilities

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

    def needs_image(self, options: Mapping[str, Any]) -> bool:
        return options.get("output") == "overlay"

    def map_of(self, row: Mapping[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
        """The map of a row of `forward`, or of what the view has merged. `size` is the image's
        (width, height)."""
        return row["logits"]

    def region(self, size: tuple[int, int]) -> Region:
        """The part of an image of (width, height) that the map covers, in the image's pixels."""
        if self.view is not None:
            return 0, 0, *size
        region: Region = self.trunk.preprocess.region(*size)
        return region

    def finish(
        self,
        row: Mapping[str, np.ndarray],
        size: tuple[int, int],
        *,
        image: Image.Image | None = None,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """`size` (2,) width and height; `index`, `label` and `pixels` (k,) of the classes in the
        mask (of two classes always both); and the mask as the option `output`.

        Args:
            options: those of `MaskOptions`.
        """
        maps = self.map_of(row, size)
        return self.answer(maps, self.labels, self.palette, size, MaskOptions(**options), image)

    def answer(
        self,
        maps: np.ndarray,
        labels: Sequence[str],
        palette: Sequence[Sequence[int]],
        size: tuple[int, int],
        options: MaskOptions,
        image: Image.Image | None,
    ) -> dict[str, np.ndarray]:
        """`finish`, for a map and its labels."""
        region, threshold, output = self.region(size), options.threshold, options.output
        if maps.ndim == 2:
            background = 0
            mask_HW = foreground_mask(maps, region, size, 0.5 if threshold is None else threshold)
            palette = OVERLAY if output == "overlay" else FOREGROUND
        else:
            background = unlabelled(len(labels))
            mask_HW = label_map(maps, region, size, threshold, softmax=self.softmax)
        if options.min_area > 1:
            mask_HW = without_specks(mask_HW, options.min_area, background)
        counts = np.bincount(mask_HW.ravel(), minlength=len(labels))
        index = np.arange(2) if maps.ndim == 2 else np.flatnonzero(counts)
        names = [labels[i] if i < len(labels) else "unlabelled" for i in index.tolist()]
        if output == "logits":
            encoded = npy(reduced(maps[None] if maps.ndim == 2 else maps).astype("<f4"))
        else:
            encoded = encode_mask(
                mask_HW, output, palette, labels=labels, background=background, image=image
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
    """(H, W) uint8, 1 where a map of probabilities, resized to the image, exceeds the threshold."""
    # two classes, one of which is the threshold itself everywhere
    level = np.full_like(map_hw, threshold)
    mask_HW = label_map(np.stack([level, map_hw]), region, size)
    above: np.ndarray = (mask_HW == 1).astype(np.uint8)
    return above


def reduced(maps_Khw: np.ndarray) -> np.ndarray:
    """The maps, with both sides halved by averaging until they have at most MAX_LOGITS bytes."""
    while maps_Khw.nbytes > MAX_LOGITS and min(maps_Khw.shape[1:]) > 1:
        size = (maps_Khw.shape[2] // 2, maps_Khw.shape[1] // 2)
        halved = [cv2.resize(each, size, interpolation=cv2.INTER_AREA) for each in maps_Khw]
        maps_Khw = np.stack(halved)
    return maps_Khw
