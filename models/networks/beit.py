"""timm's BEiT (arXiv 2106.08254) with the authors' way of resizing absolute positions."""

from functools import partial
from typing import Any

import torch
from timm.models import beit
from torch import Tensor, nn

from models.networks.vit import dino_rule


class Beit(beit.Beit):  # type: ignore[misc]
    """timm's BEiT for inputs of other sizes, if it has no tables of relative positions.

    Upstream resizes its absolute positions by DINO's rule. Relative ones are for one size.
    """

    def __init__(self, *, norm_eps: float = 1e-6, **arguments: Any) -> None:
        """
        Args:
            norm_eps: epsilon of every layer norm.
        """
        super().__init__(norm_layer=partial(nn.LayerNorm, eps=norm_eps), **arguments)
        tables = [block.attn.relative_position_bias_table for block in self.blocks]
        self._is_fixed = self.rel_pos_bias is not None or tables[0] is not None
        self.patch_embed.strict_img_size = self._is_fixed

    def check_size(self, height: int, width: int) -> str | None:
        """What is wrong with inputs of that size, or None."""
        stored = self.patch_embed.img_size
        if self._is_fixed and (height, width) != stored:
            return f"its relative positions are for {stored[0]}x{stored[1]} pixels alone"
        return None

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """The table (1, T, D) for a grid of (h, w) cells, class token first; None without one."""
        table: Tensor | None = self.pos_embed
        stored: tuple[int, int] = self.patch_embed.grid_size
        if table is None or grid == stored:
            return table
        cells = torch.unflatten(table[:, 1:], 1, stored).permute(0, 3, 1, 2)
        resized = dino_rule(cells, grid)
        return torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2)], 1)

    def embed(self, pixels_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches (B, N, D) without positions, and their grid. Pixels beyond the last whole patch
        are ignored, as a convolution does."""
        rows, columns = self.patch_embed.patch_size
        grid = pixels_BCHW.shape[2] // rows, pixels_BCHW.shape[3] // columns
        whole = pixels_BCHW[..., : grid[0] * rows, : grid[1] * columns]
        return self.patch_embed(whole), grid

    def encode(self, patches_BND: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The tokens (B, 1 + N, D) after each block, before the norm."""
        x = torch.cat([self.cls_token.expand(len(patches_BND), -1, -1), patches_BND], 1)
        if (table := self.positions(grid)) is not None:
            x = x + table
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()
        outputs = []
        for block in self.blocks:
            x = block(x, shared_rel_pos_bias=shared)
            outputs.append(x)
        return outputs

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the norm, (B, 1 + N, D)."""
        normed: Tensor = self.norm(self.encode(*self.embed(x))[-1])
        return normed


NETWORKS = {"beit": Beit}
