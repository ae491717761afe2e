"""Where a trunk looks: how much its class token reads each patch, in its last block."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from models.errors import InputError
from models.heads.base import BaseHead
from models.heads.generate import encode_png
from models.networks.patchconvnet import PatchConvNet
from models.tasks.rendering import npy
from models.trunks.base import Trunk, TrunkOutput
from models.trunks.features import Need

OVERLAY_SHARE = 0.6


class Attention(BaseHead):
    """The last block's attention of a plain ViT (as DINO, arXiv 2104.14294, shows it), or that of
    PatchConvNet's pooling (arXiv 2112.13692)."""

    task = "attention"
    finish_is_slow = True

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk

    def needs(self, rows: Sequence[int]) -> Need:
        if isinstance(self.trunk.network, PatchConvNet):
            return Need(pixels=True, features=False)
        return Need(looks=frozenset({len(self.trunk.blocks) - 1}))

    def sees_image(self, options: Mapping[str, Any]) -> bool:
        return bool(options.get("output", "overlay") == "overlay")

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        """`attention` (B, heads, h, w) probabilities, which with those of the other tokens sum to
        1; with several class tokens there is a map of each."""
        if isinstance(self.trunk.network, PatchConvNet):
            assert output.pixels is not None
            maps = self.trunk.network.last_attention(output.pixels)
            maps = maps[..., -output.grid[0] * output.grid[1] :].flatten(1, 2)
        else:
            maps = output.looks[len(self.trunk.blocks) - 1][..., output.prefix :]
        return {"attention": maps.reshape(*maps.shape[:2], *output.grid)}

    def finish(
        self,
        row: Mapping[str, np.ndarray],
        size: tuple[int, int],
        *,
        output: str = "overlay",
        head: int | None = None,
        image: Image.Image | None = None,
    ) -> dict[str, np.ndarray]:
        """`size` (2,) width and height, `heads` and `grid` (2,) of the maps; and `output`: the
        bytes of a PNG of the image's size, `overlay` on the `image` itself or `map` alone (white
        where most is read), or `npy`, the maps (heads, h, w) float32.

        Args:
            head: one of them instead of their mean; for `npy` instead of all.
        """
        maps = row["attention"]
        if head is not None:
            if head >= len(maps):
                raise InputError(f"head is {head}; there are {len(maps)}", field="head")
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
        colours = (colormaps["inferno"](placed)[..., :3] * 255).astype(np.uint8)
        return Image.blend(image, Image.fromarray(colours), OVERLAY_SHARE)


def has_attention(trunk: Trunk) -> bool:
    """Whether there is a class token whose attention can be read."""
    if isinstance(trunk.network, PatchConvNet):
        return True
    return bool(trunk.blocks) and getattr(trunk.network, "cls_token", None) is not None
