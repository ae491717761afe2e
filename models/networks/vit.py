"""timm's ViT with what its authors' codes do otherwise: how positions are resized, and the stem.

Every code resizes the table of positions by a rule of its own, none of them timm's (which filters
against aliasing).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate

# Cells (1, D, h, w) as stored, and the grid wanted, to cells (1, D, H, W).
Rule = Callable[[Tensor, tuple[int, int]], Tensor]


def dino_rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINO's (and iBOT's, SiT's): a scale factor with 0.1 added to the grid, which moves every
    sampling point."""
    stored = cells_1Dhw.shape[-1]
    factors = tuple((side + 0.1) / stored for side in grid)
    return interpolate(cells_1Dhw, scale_factor=factors, mode="bicubic")


def bicubic_rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """MAE's and its kin's: to that size, not filtered against aliasing."""
    return interpolate(cells_1Dhw, size=grid, mode="bicubic", align_corners=False)


def corners_rule(cells_1Dhw: Tensor, grid: tuple[int, int]) -> Tensor:
    """Google's JAX code (scipy's zoom of order 1): linear, corners on corners."""
    return interpolate(cells_1Dhw, size=grid, mode="bilinear", align_corners=True)


RULES: dict[str, Rule] = {"dino": dino_rule, "bicubic": bicubic_rule, "corners": corners_rule}


class Patches(PatchEmbed):  # type: ignore[misc]
    """Pixels beyond the last whole patch are left out, as a convolution leaves them."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.patch_size
        height, width = x.shape[-2:]
        whole = x[..., : height // rows * rows, : width // columns * columns]
        embedded: Tensor = super().forward(whole)
        return embedded


class ConvStem(Patches):
    """MoCo v3's stem of convolutions (arXiv 2106.14881): four of stride 2, then one of 1x1."""

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
    """`positions` names the rule for other input sizes than the stored one's, or is `fixed`;
    `norm_eps` is that of every norm."""

    def __init__(
        self, *, positions: str, conv_stem: bool = False, norm_eps: float = 1e-6, **arguments: Any
    ) -> None:
        """
        Raises:
            KeyError: no such rule.
        """
        embed_layer = ConvStem if conv_stem else Patches
        self._rule = None if positions == "fixed" else RULES[positions]
        super().__init__(
            dynamic_img_size=self._rule is not None,
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
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + self.positions(grid)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, T, D): the table for a grid of (h, w) cells, class token first if there is one."""
        table: Tensor = self.pos_embed
        stored: tuple[int, int] = self.patch_embed.grid_size
        if self._rule is None or grid == stored:
            return table
        prefix = self.num_prefix_tokens
        cells = torch.unflatten(table[:, prefix:], 1, stored).permute(0, 3, 1, 2)
        resized = self._rule(cells, grid)
        return torch.cat([table[:, :prefix], resized.flatten(2).transpose(1, 2)], 1)


class ProjectedVit(Vit):
    """The image tower of a two-tower model: what is pooled, projected to where texts are."""

    def __init__(self, *, projected: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.projection = nn.Parameter(torch.zeros(self.embed_dim, projected))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, projected)."""
        pooled: Tensor = super().forward_head(x, pre_logits=True)
        return pooled @ self.projection
