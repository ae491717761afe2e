"""Views: how a head cuts an image into inputs, instead of the trunk's own transform."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor


class View(Protocol):
    """Cuts an image and merges the outputs. Heads with equal views share their passes."""

    def __hash__(self) -> int: ...

    def cut(self, image: Image.Image) -> list[Tensor]:
        """The pieces of an RGB image, uint8 (3, H, W) each. A piece is one input of the trunk."""

    def merge(
        self, rows: Sequence[Mapping[str, np.ndarray]], size: tuple[int, int]
    ) -> Mapping[str, np.ndarray]:
        """The outputs of a head's `forward` for each piece, merged to the input of its `finish`.

        Args:
            size: (width, height) of the image.
        """
