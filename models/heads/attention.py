"""Attention maps: how much a trunk's class token attends to each patch, in its last block."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor

from models.checkpoints.checkpoint import HeadState
from models.errors import CatalogError, InputError
from models.heads.base import Head
from models.heads.generate import encode_png
from models.tasks.rendering import npy
from models.trunks.base import Trunk
from models.trunks.output import TrunkOutput

OVERLAY_SHARE = 0.6


class Attention(Head):
    """The last block's attention of a plain ViT (as DINO, arXiv 2104.14294, shows it), or that of
    PatchConvNet's pooling (arXiv 2112.13692)."""

    kind = "attention"
    task = "attention"
    finish_is_slow = True

    def __init__(self, trunk: Trunk) -> None:
        """
        Raises:
            CatalogError: the trunk has no class token whose attention can be read.
        """
        request = trunk.attention_request()
        if request is None:
            raise CatalogError(f"{trunk.architecture} has no class token's attention")
        self.trunk = trunk
        self.request = request

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        return cls(trunk)

    @classmethod
    def comes_with(cls, trunk: Trunk, states: Mapping[str, HeadState]) -> bool:
        return trunk.attention_request() is not None

    def needs_image(self, options: Mapping[str, Any]) -> bool:
        return bool(options.get("output", "overlay") == "overlay")

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        """`attention` (B, heads, h, w): probabilities."""
        return {"attention": self.trunk.class_attention(output)}

    def finish(
        self,
        row: Mapping[str, np.ndarray],
        size: tuple[int, int],
        *,
        output: str = "overlay",
        head: int | None = None,
        image: Image.Image | None = None,
    ) -> dict[str, np.ndarray]:
        """`size` (2,) width and height, `heads` and `grid` (2,) of the maps, the `region` (4,) of
        the image that they cover (see `Preprocess.region`), and the `output`: bytes of a PNG of the
        image's size (`overlay` on the `image`, or `map` alone, white where attention is highest),
        or `npy`, the maps (heads, h, w) float32.

        Args:
            head: one head instead of their mean; in `npy` instead of all.
        """
        maps = row["attention"]
        if head is not None:
            if head >= len(maps):
                raise InputError(f"head is {head}; this model has {len(maps)} heads", field="head")
            maps = maps[head : head + 1]
        if output == "npy":
            drawn = npy(maps.astype("<f4"))
        else:
            drawn = encode_png(
                self._draw(maps.mean(0), size, image if output == "overlay" else None)
            )
        return {
            "size": np.array(size),
            "heads": np.array(len(row["attention"])),
            "grid": np.array(row["attention"].shape[1:]),
            "region": np.array(self.trunk.preprocess.region(*size)),
            output: drawn,
        }

    def _draw(
        self, map_hw: np.ndarray, size: tuple[int, int], image: Image.Image | None
    ) -> Image.Image:
        low, high = float(map_hw.min()), float(map_hw.max())
        scaled = (map_hw - low) / max(high - low, 1e-12)
        placed = self.trunk.preprocess.place(scaled.astype(np.float32), size)
        if image is None:
            return Image.fromarray(np.rint(placed * 255).astype(np.uint8))
        from matplotlib import colormaps  # here, because it takes a tenth of a worker's start

        colours = (colormaps["inferno"](placed)[..., :3] * 255).astype(np.uint8)
        return Image.blend(image, Image.fromarray(colours), OVERLAY_SHARE)
