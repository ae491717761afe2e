"""timm's ViT with the authors' ways of resizing positions and embedding patches.

Each code base resizes the position table by its own rule. All of them differ from timm's, which
uses an antialiasing filter.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

# Stored cells (1, D, h, w) and a target grid (H, W) to cells (1, D, H, W).
Rule = Callable[[Tensor, tuple[int, int]], Tensor]


def dino_rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rule of DINO, iBOT and SiT: bicubic by a scale factor, with 0.1 added to the grid.

    The addition moves every sampling point.
    """
    stored = cells_1Dhw.shape[-1]
    factors = tuple((side + 0.1) / stored for side in grid)
    return interpolate(cells_1Dhw, scale_factor=factors, mode="bicubic")


def bicubic_rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rule of MAE and related code: bicubic to the target size, without antialiasing."""
    return interpolate(cells_1Dhw, size=grid, mode="bicubic", align_corners=False)


def corners_rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rule of Google's JAX code (scipy's `zoom` of order 1): bilinear with aligned corners."""
    return interpolate(cells_1Dhw, size=grid, mode="bilinear", align_corners=True)


def by_count(mode: str) -> Rule:
    """The rule of mmsegmentation: as it is for as many cells, in whatever grid; otherwise resized
    by `mode` to the target size, without antialiasing."""

    def rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
        if cells_1Dhw[0, 0].numel() == grid[0] * grid[1]:
            return cells_1Dhw.reshape(*cells_1Dhw.shape[:2], *grid)
        return interpolate(cells_1Dhw, size=grid, mode=mode, align_corners=False)

    return rule


RULES: dict[str, Rule] = {
    "bicubic": bicubic_rule,
    "bicubic-by-count": by_count("bicubic"),
    "bilinear-by-count": by_count("bilinear"),
    "corners": corners_rule,
    "dino": dino_rule,
}


class Patches(PatchEmbed):  # type: ignore[misc]
    """Patch embedding that ignores pixels beyond the last whole patch, as a convolution does, or
    pads the input at the bottom and on the right (timm's `dynamic_img_pad`)."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.patch_size
        if self.dynamic_img_pad:
            padded: Tensor = super().forward(x)
            return padded
        height, width = x.shape[-2:]
        whole = x[..., : height // rows * rows, : width // columns * columns]
        embedded: Tensor = super().forward(whole)
        return embedded


class CenteredPatches(Patches):
    """Patch embedding that pads the input on all sides, the odd pixel at the bottom and right."""

    def forward(self, x: Tensor) -> Tensor:
        (rows, columns), (height, width) = self.patch_size, x.shape[-2:]
        down, across = -height % rows, -width % columns
        x = pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return super().forward(x)


class ConvStem(Patches):
    """MoCo v3's convolutional stem (arXiv 2106.14881): four of stride 2, then a 1x1."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        final: Any = self.get_submodule("proj")
        layers: list[nn.Module] = []
        inputs = final.in_channels
        for divisor in (8, 4, 2, 1):
            outputs = final.out_channels // divisor
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        self.proj = nn.Sequential(*layers, nn.Conv2d(inputs, final.out_channels, 1))


class Vit(VisionTransformer):  # type: ignore[misc]
    """timm's ViT with a chosen rule for resizing its positions."""

    def __init__(
        self,
        *,
        positions: str,
        conv_stem: bool = False,
        padding: str = "",
        norm_eps: float = 1e-6,
        **arguments: Any,
    ) -> None:
        """
        Args:
            positions: name of the rule in `RULES`, or `fixed` for inputs of one size.
            conv_stem: embed patches by `ConvStem`.
            padding: pad inputs with zeros to whole patches, at the `corner` or around the `center`.
                Without it, pixels beyond the last whole patch are ignored.
            norm_eps: epsilon of every layer norm.

        Raises:
            KeyError: no rule is called `positions`.
        """
        embed_layer = CenteredPatches if padding == "center" else Patches
        if conv_stem:
            embed_layer = ConvStem
        self._rule = None if positions == "fixed" else RULES[positions]
        super().__init__(
            dynamic_img_size=self._rule is not None,
            dynamic_img_pad=bool(padding),
            embed_layer=embed_layer,
            norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            **arguments,
        )

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self._rule is None:
            embedded: Tensor = super()._pos_embed(x)
            return embedded
        grid = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return x + self.positions(grid)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table (1, T, D) for a grid of (h, w) cells, a class token first if there is one."""
        table: Tensor = self.pos_embed
        stored: tuple[int, int] = self.patch_embed.grid_size
        if self._rule is None or grid == stored:
            return table
        prefix = self.num_prefix_tokens
        cells = torch.unflatten(table[:, prefix:], 1, stored).permute(0, 3, 1, 2)
        resized = self._rule(cells, grid)
        return torch.cat([table[:, :prefix], resized.flatten(2).transpose(1, 2)], 1)


class ProjectedVit(Vit):
    """The image tower of a two-tower model: a ViT with a projection to the shared space."""

    def __init__(self, *, projected: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.projection = nn.Parameter(torch.zeros(self.embed_dim, projected))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The projected pooled features, (B, projected)."""
        pooled: Tensor = super().forward_head(x, pre_logits=True)
        return pooled @ self.projection


NETWORKS = {"projected-vit": ProjectedVit, "vit": Vit}
