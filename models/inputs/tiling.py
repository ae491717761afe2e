"""How a head wants an image where the trunk's own transform will not do: in pieces."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor


class View(Protocol):
    """Compared by value: heads with equal views share their passes."""

    def __hash__(self) -> int: ...

    def cut(self, image: Image.Image) -> list[Tensor]:
        """The pieces of an RGB image as uint8 tensors (3, H, W), each of which is one input."""

    def merge(
        self, rows: Sequence[Mapping[str, np.ndarray]], size: tuple[int, int]
    ) -> Mapping[str, np.ndarray]:
        """What a head's `forward` gave for each piece, put together as its `finish` takes it;
        `size` is the image's (width, height)."""
