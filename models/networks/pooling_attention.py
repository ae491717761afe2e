"""Attention among pooled tokens (MViT, arXiv 2104.11227), with the names of its authors' code."""

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.errors import InputError

Grid = tuple[int, int, int]
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def pool_tokens(
    x_BHNC: Tensor, pool: nn.Module | None, grid: Grid, prefix: int, norm: nn.Module | None = None
) -> tuple[Tensor, Grid]:
    """Pool (B, H, prefix + T * h * w, C) over the grid; prefix tokens stay. Also the new grid."""
    if pool is None:
        return x_BHNC, grid
    batch, heads, _, channels = x_BHNC.shape
    first, cells = x_BHNC[:, :, :prefix], x_BHNC[:, :, prefix:]
    cells = cells.reshape(batch * heads, *grid, channels).permute(0, 4, 1, 2, 3)
    pooled: Tensor = pool(cells)
    frames, rows, columns = pooled.shape[2:]
    x_BHNC = pooled.reshape(batch, heads, channels, -1).transpose(2, 3)
    x_BHNC = torch.cat([first, x_BHNC], 2) if prefix else x_BHNC
    return x_BHNC if norm is None else norm(x_BHNC), (frames, rows, columns)


def pooled_grid(grid: Grid, pool: Any) -> Grid:
    """The grid that pooling leaves of a grid."""
    if pool is None:
        return grid
    sizes = zip(grid, pool.kernel_size, pool.stride, pool.padding, strict=True)
    frames, rows, columns = ((n + 2 * pad - k) // step + 1 for n, k, step, pad in sizes)
    return frames, rows, columns


class RelativePositions(nn.Module):
    """Which row of a table of relative positions each pair of a query and a key takes, along one
    axis with so many queries and keys. The rows are a buffer: a pass sends nothing to its device.
    """

    rows_QK: Tensor

    def __init__(self, queries: int, keys: int) -> None:
        super().__init__()
        query_step, key_step = max(keys / queries, 1.0), max(queries / keys, 1.0)
        distance = torch.arange(queries)[:, None] * query_step - torch.arange(keys)[None] * key_step
        rows_QK = (distance + (keys - 1) * key_step).long()
        self.register_buffer("rows_QK", rows_QK, persistent=False)
        self.lengths = queries, keys
        # that of the last query and the first key; not read from the tensor, which may have no data
        self._needed = int((queries - 1) * query_step + (keys - 1) * key_step) + 1

    def forward(self, table_LD: Tensor, *, resized: bool) -> Tensor:
        """(queries, keys, D): rows of the table.

        Args:
            resized: resize the table linearly to the axis; else it must be long enough.
        """
        length = 2 * max(self.lengths) - 1
        if resized and len(table_LD) != length:
            table_LD = interpolate(table_LD.T[None], size=length, mode="linear")[0].T
        if self._needed > len(table_LD):
            raise InputError(
                f"the input is too large: relative positions reach {len(table_LD)} cells, and "
                f"{self._needed} are needed"
            )
        return table_LD[self.rows_QK]


class Attention(nn.Module):
    """Attention among tokens that are pooled first.

    Args:
        kernel_q, stride_q, kernel_kv, stride_kv: of the pooling over (T, h, w); empty for none.
        mode: `conv`, `conv_unshared`, `avg` or `max`.
        size: (T, h, w) that relative positions are for. `set_grid` tells the tokens' own.
        resized: resize relative positions where the grid has another size.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        num_heads: int,
        size: Grid,
        kernel_q: Sequence[int],
        kernel_kv: Sequence[int],
        stride_q: Sequence[int],
        stride_kv: Sequence[int],
        prefix: int,
        qkv_bias: bool,
        mode: str,
        pool_first: bool,
        separate_qkv: bool,
        spatial: bool,
        temporal: bool,
        residual: bool,
        resized: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.prefix, self.mode = num_heads, prefix, mode
        self.pool_first, self.residual, self.resized = pool_first, residual, resized
        head_dim = dim_out // num_heads
        self.scale = head_dim**-0.5
        self.separate = pool_first or separate_qkv
        if self.separate:
            self.q, self.k, self.v = (nn.Linear(dim, dim_out, bias=qkv_bias) for _ in range(3))
        else:
            self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias)
        self.proj = nn.Linear(dim_out, dim_out)
        pooled = (dim if pool_first else dim_out) // (1 if mode == "conv_unshared" else num_heads)
        settings = {"q": (kernel_q, stride_q), "k": (kernel_kv, stride_kv)}
        for name, (kernel, stride) in (settings | {"v": settings["k"]}).items():
            used = bool(kernel) and not (prod(kernel) == 1 and prod(stride) == 1)
            pool = create_pool(pooled, kernel, stride, mode) if used else None
            norm = LayerNorm(pooled) if used and mode.startswith("conv") else None
            self.add_module(f"pool_{name}", pool)
            self.add_module(f"norm_{name}", norm)
        if spatial:
            side = max(size[1] // (s[1] if s else 1) for s in (stride_q, stride_kv))
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, head_dim))
        if temporal:
            self.rel_pos_t = nn.Parameter(torch.zeros(2 * size[0] - 1, head_dim))
        self.spatial, self.temporal = spatial, temporal
        self.positions = nn.ModuleList()

    def set_grid(self, grid: Grid) -> Grid:
        """Prepare for tokens of this grid, before weights move to a device: those of other grids
        are sent their relative positions in each pass. Returns the grid of the pooled queries."""
        q_grid, k_grid = (pooled_grid(grid, self._modules[f"pool_{name}"]) for name in "qk")
        if self.spatial or self.temporal:
            pairs = zip(q_grid, k_grid, strict=True)
            self.positions = nn.ModuleList(RelativePositions(*lengths) for lengths in pairs)
        return q_grid

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, N, dim) to (B, M, dim_out), and the grid of the M tokens."""
        q, k, v = self._project_and_split(x)
        q, q_grid = self._pool("q", q, grid)
        k, k_grid = self._pool("k", k, grid)
        v, _ = self._pool("v", v, grid)
        if self.pool_first:
            q, k, v = self._merged("q", q), self._merged("k", k), self._merged("v", v)
        attention = (q * self.scale) @ k.transpose(-2, -1)
        if self.spatial or self.temporal:
            attention = self._add_positions(attention, q, q_grid, k_grid)
        x = attention.softmax(-1) @ v
        if self.residual and self.prefix:
            x = torch.cat([x[:, :, :1], x[:, :, 1:] + q[:, :, 1:]], 2)
        elif self.residual:
            x = x + q
        out: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return out, q_grid

    def _project_and_split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, C)."""
        if self.pool_first:
            x = self._split(x, 1 if self.mode == "conv_unshared" else self.num_heads)
            return x, x, x
        if self.separate:
            return self._split(self.q(x)), self._split(self.k(x)), self._split(self.v(x))
        q, k, v = self.qkv(x).chunk(3, -1)
        return self._split(q), self._split(k), self._split(v)

    def _split(self, x: Tensor, heads: int = 0) -> Tensor:
        return torch.unflatten(x, 2, (heads or self.num_heads, -1)).transpose(1, 2)

    def _pool(self, name: str, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        pool, norm = self._modules[f"pool_{name}"], self._modules[f"norm_{name}"]
        return pool_tokens(x, pool, grid, self.prefix, norm)

    def _merged(self, name: str, x: Tensor) -> Tensor:
        """Tokens that were pooled before their projection, projected."""
        return self._split(self.get_submodule(name)(x.transpose(1, 2).flatten(2)))

    def _add_positions(self, attention: Tensor, q: Tensor, q_grid: Grid, k_grid: Grid) -> Tensor:
        prefix = self.prefix
        batch, heads = q.shape[:2]
        cells = q[:, :, prefix:].reshape(batch, heads, *q_grid, -1)
        shape = (batch, heads, *q_grid, *k_grid)
        bias = attention.new_zeros(())
        if self.spatial:
            rows = self._relative(self.rel_pos_h, q_grid, k_grid, axis=1)
            columns = self._relative(self.rel_pos_w, q_grid, k_grid, axis=2)
            down = torch.einsum("bythwc,hkc->bythwk", cells, rows)
            across = torch.einsum("bythwc,wkc->bythwk", cells, columns)
            bias = down[..., None, :, None] + across[..., None, None, :]
        if self.temporal:
            frames = self._relative(self.rel_pos_t, q_grid, k_grid, axis=0)
            along = torch.einsum("bythwc,tkc->bythwk", cells, frames)
            bias = bias + along[..., :, None, None]
        bias = bias.expand(shape).reshape(batch, heads, prod(q_grid), prod(k_grid))
        if not prefix:
            return attention + bias
        lower = torch.cat([attention[:, :, 1:, :1], attention[:, :, 1:, 1:] + bias], 3)
        return torch.cat([attention[:, :, :1], lower], 2)

    def _relative(self, table_LD: Tensor, q_grid: Grid, k_grid: Grid, *, axis: int) -> Tensor:
        """(queries, keys, D) along an axis."""
        lengths = q_grid[axis], k_grid[axis]
        positions = self.positions[axis] if self.positions else None
        if positions is None or positions.lengths != lengths:
            positions = RelativePositions(*lengths).to(table_LD.device)
        result: Tensor = positions(table_LD, resized=self.resized)
        return result


def create_pool(
    channels: int, kernel: Sequence[int], stride: Sequence[int], mode: str
) -> nn.Module:
    """Pooling over (T, h, w): a depthwise convolution, or `avg` or `max`."""
    padding = [size // 2 for size in kernel]
    sizes: Any = {"kernel_size": tuple(kernel), "stride": tuple(stride), "padding": tuple(padding)}
    if mode in ("avg", "max"):
        return nn.MaxPool3d(**sizes) if mode == "max" else nn.AvgPool3d(**sizes)
    return nn.Conv3d(channels, channels, groups=channels, bias=False, **sizes)


class Block(nn.Module):
    """Attention and an MLP.

    Args:
        widen_in_attention: `proj` widens before the attention's residual; else before the MLP's.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        widen_in_attention: bool,
        mlp_ratio: float,
        stride_q: Sequence[int],
        prefix: int,
        **attention: Any,
    ) -> None:
        super().__init__()
        inner = dim_out if widen_in_attention else dim
        self.prefix, self.widen_in_attention = prefix, widen_in_attention
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, inner, stride_q=stride_q, prefix=prefix, **attention)
        self.norm2 = LayerNorm(inner)
        self.mlp = Mlp(inner, int(inner * mlp_ratio), dim_out)
        self.proj = nn.Linear(dim, dim_out) if dim != dim_out else None
        kernel = [stride + 1 if stride > 1 else stride for stride in stride_q]
        pools = bool(stride_q) and prod(stride_q) > 1
        self.pool_skip = create_pool(dim, kernel, stride_q, "max") if pools else None

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        normed = self.norm1(x)
        attended, new_grid = self.attn(normed, grid)
        if self.proj is not None and self.widen_in_attention:
            x = self.proj(normed)
        skipped, _ = pool_tokens(x[:, None], self.pool_skip, grid, self.prefix)
        x = skipped[:, 0] + attended
        normed = self.norm2(x)
        if self.proj is not None and not self.widen_in_attention:
            x = self.proj(normed)
        return x + self.mlp(normed), new_grid
