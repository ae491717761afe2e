"""Attention of a Vision Longformer (arXiv 2103.15358, github.com/microsoft/esvit), full or sliding,
over global tokens and the patches of a map. Modules have upstream's names."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, softmax


class GlobalBias(nn.Module):
    """What attention adds to scores by relative position: a table for pairs of patches, and biases
    of pairs with a global token."""

    def add_tables(self, rows: int, heads: int, tokens: int) -> None:
        """Create the parameters, which are this module's own."""
        self.local_relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        if tokens:
            self.g2l_relative_position_bias = nn.Parameter(torch.zeros(2, heads, tokens))
            self.g2g_relative_position_bias = nn.Parameter(torch.zeros(heads, tokens, tokens))

    def of_tokens(self, patches: int) -> Tensor:
        """(heads, G, G + N): of global queries."""
        to_patches = self.g2l_relative_position_bias[0][..., None].expand(-1, -1, patches)
        return torch.cat([self.g2g_relative_position_bias, to_patches], -1)


class FullAttention(GlobalBias):
    """Attention of all tokens to all, with biases by relative position if there are tables."""

    index: Tensor

    def __init__(
        self, dim: int, heads: int, *, tokens: int, bias: bool, table: int, window: int
    ) -> None:
        """
        Args:
            table: rows and columns of patches that biases are for; 0 for none.
            window: not used; sliding attention has it.
        """
        super().__init__()
        self.heads, self.tokens = heads, tokens
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.table = table
        if table:
            self.add_tables((2 * table - 1) ** 2, heads, tokens)
            index = relative_index(torch.arange(table), torch.arange(table), table - 1)
            self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        split = torch.unflatten(self.qkv(x), 2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = split.unbind(0)
        scores = queries @ keys.transpose(-2, -1) * self.scale
        if self.table:
            scores = scores + self._bias(grid[0] * grid[1])
        out = softmax(scores, -1) @ values
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected

    def _bias(self, patches: int) -> Tensor:
        """(heads, T, T). Upstream resizes the matrix of all pairs for other numbers of patches."""
        bias = self.local_relative_position_bias_table[self.index].permute(2, 0, 1)
        if patches != bias.shape[1]:
            bias = interpolate(bias[None], size=(patches, patches), mode="bicubic")[0]
        if not self.tokens:
            return bias
        to_tokens = self.g2l_relative_position_bias[1][:, None].expand(-1, patches, -1)
        return torch.cat([self.of_tokens(patches), torch.cat([to_tokens, bias], -1)], 1)


class SlidingAttention(GlobalBias):
    """Attention of patches to their own and the eight windows around it, and to global tokens."""

    index: Tensor

    def __init__(
        self, dim: int, heads: int, *, tokens: int, bias: bool, table: int, window: int
    ) -> None:
        """
        Args:
            table: whether biases are added by relative position (not 0).
            window: patches of a window's side.
        """
        super().__init__()
        self.heads, self.tokens, self.window = heads, tokens, window
        self.scale = (dim // heads) ** -0.5
        self.query, self.kv = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        if tokens:
            self.query_global = nn.Linear(dim, dim, bias=bias)
            self.kv_global = nn.Linear(dim, 2 * dim, bias=bias)
            self.proj_global = nn.Linear(dim, dim)
        self.table = table
        if table:
            self.add_tables((4 * window - 1) ** 2, heads, tokens)
            index = relative_index(
                torch.arange(window), torch.arange(-window, 2 * window), 2 * window - 1
            )
            self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        keys, values = self._split(self.kv(x), 2)
        patches = self._patches(x[:, self.tokens :], keys, values, grid)
        out: Tensor = self.proj(patches)
        if not self.tokens:
            return out
        return torch.cat([self._of_tokens(x), out], 1)

    def _split(self, x: Tensor, parts: int) -> Tensor:
        """(parts, B, heads, T, d)."""
        return torch.unflatten(x, 2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _of_tokens(self, x: Tensor) -> Tensor:
        """The global tokens' output, which see all tokens."""
        [queries] = self._split(self.query_global(x[:, : self.tokens]), 1)
        keys, values = self._split(self.kv_global(x), 2)
        scores = self.scale * queries @ keys.transpose(-2, -1)
        if self.table:
            scores = scores + self.of_tokens(x.shape[1] - self.tokens)
        out = softmax(scores, -1) @ values
        projected: Tensor = self.proj_global(out.transpose(1, 2).flatten(2))
        return projected

    def _patches(self, x: Tensor, keys: Tensor, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """The patches' output (B, N, D) before its projection."""
        side, (rows, columns) = self.window, grid
        below, right = -rows % side, -columns % side
        down, across = (rows + below) // side, (columns + right) // side
        [queries] = self._split(self.query(x), 1)
        own = torch.unflatten(self._as_map(queries, grid, (0, right, 0, below)), 3, (across, side))
        own = torch.unflatten(own, 2, (down, side)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4)
        around = (side, side + right, side, side + below)
        near_keys, near_values = (
            self._neighbours(self._as_map(part[:, :, self.tokens :], grid, around))
            for part in (keys, values)
        )  # (B * heads, down, across, 9 side^2, d)
        scores = self.scale * own @ near_keys.transpose(-2, -1)
        if self.table:
            bias = self.local_relative_position_bias_table[self.index].permute(2, 0, 1)
            scores = scores + bias[:, None, None].repeat(len(x), 1, 1, 1, 1)
        inside = x.new_ones(1, 1, rows, columns, dtype=torch.bool)
        inside = self._neighbours(pad(inside.to(x.dtype), around))[0, ..., 0] > 0
        scores = scores.masked_fill(~inside[:, :, None], float("-inf"))
        if not self.tokens:
            out = softmax(scores, -1) @ near_values
        else:
            token_keys, token_values = (
                part[:, :, : self.tokens].flatten(0, 1)[:, None, None] for part in (keys, values)
            )
            to_tokens = self.scale * own @ token_keys.transpose(-2, -1)
            if self.table:
                bias = self.g2l_relative_position_bias[1][:, None, None, None]
                to_tokens = to_tokens + bias.repeat(len(x), 1, 1, 1, 1)
            shares = softmax(torch.cat([to_tokens, scores], -1), -1)
            out = shares[..., : self.tokens] @ token_values
            out = out + shares[..., self.tokens :] @ near_values
        out = torch.unflatten(out, 3, (side, side)).permute(0, 1, 3, 2, 4, 5)
        out = out.flatten(3, 4).flatten(1, 2)[:, :rows, :columns].flatten(1, 2)
        return torch.unflatten(out, 0, (-1, self.heads)).transpose(1, 2).flatten(2)

    def _as_map(self, x: Tensor, grid: tuple[int, int], padding: Sequence[int]) -> Tensor:
        """(B, heads, N, d) as a padded map (B * heads, d, h, w)."""
        return pad(torch.unflatten(x.flatten(0, 1).transpose(1, 2), 2, grid), tuple(padding))

    def _neighbours(self, x: Tensor) -> Tensor:
        """(B, down, across, 9 side^2, d) of a map with a window's side around it."""
        windows = x.unfold(2, 3 * self.window, self.window).unfold(3, 3 * self.window, self.window)
        return windows.permute(0, 2, 3, 4, 5, 1).flatten(3, 4)


def relative_index(queries: Tensor, keys: Tensor, offset: int) -> Tensor:
    """(Q^2, K^2): where pairs of cells, row by row, stand in a table of 2 `offset` + 1 rows and
    columns.

    Args:
        queries, keys: coordinates along one side.
    """
    apart = queries[:, None] - keys + offset
    both = apart[:, None, :, None] * (2 * offset + 1) + apart[None, :, None]
    return both.flatten(2, 3).flatten(0, 1)
