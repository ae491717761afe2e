"""MViT v1 and v2 (arXiv 2104.11227, 2112.01526), and their reversible form (CVPR 2022).

Parameters have the names of github.com/facebookresearch/SlowFast, whose configurations these
arguments are read from. Images are clips of one frame. timm and torchvision have a few of the
options each; here are all that published models use.
"""

from collections.abc import Mapping, Sequence
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


def relative(table_LD: Tensor, queries: int, keys: int, *, resized: bool) -> Tensor:
    """(queries, keys, D): rows of a table of relative positions along one axis.

    Args:
        resized: resize the table linearly to the axis; else it must be long enough.
    """
    needed = 2 * max(queries, keys) - 1
    if resized and len(table_LD) != needed:
        table_LD = interpolate(table_LD.T[None], size=needed, mode="linear")[0].T
    query_step, key_step = max(keys / queries, 1.0), max(queries / keys, 1.0)
    distance = torch.arange(queries)[:, None] * query_step - torch.arange(keys)[None] * key_step
    distance = (distance + (keys - 1) * key_step).long()
    if int(distance.max()) >= len(table_LD):
        raise InputError(
            f"the input is too large: relative positions reach {len(table_LD)} cells, and "
            f"{int(distance.max()) + 1} are needed"
        )
    return table_LD[distance.to(table_LD.device)]


class Attention(nn.Module):
    """Attention among tokens that are pooled first.

    Args:
        kernel_q, stride_q, kernel_kv, stride_kv: of the pooling over (T, h, w); empty for none.
        mode: `conv`, `conv_unshared`, `avg` or `max`.
        size: (T, h, w) that relative positions are for.
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
        prefix, resized = self.prefix, self.resized
        batch, heads = q.shape[:2]
        cells = q[:, :, prefix:].reshape(batch, heads, *q_grid, -1)
        shape = (batch, heads, *q_grid, *k_grid)
        bias = attention.new_zeros(())
        if self.spatial:
            rows = relative(self.rel_pos_h, q_grid[1], k_grid[1], resized=resized)
            columns = relative(self.rel_pos_w, q_grid[2], k_grid[2], resized=resized)
            down = torch.einsum("bythwc,hkc->bythwk", cells, rows)
            across = torch.einsum("bythwc,wkc->bythwk", cells, columns)
            bias = down[..., None, :, None] + across[..., None, None, :]
        if self.temporal:
            frames = relative(self.rel_pos_t, q_grid[0], k_grid[0], resized=resized)
            along = torch.einsum("bythwc,tkc->bythwk", cells, frames)
            bias = bias + along[..., :, None, None]
        bias = bias.expand(shape).reshape(batch, heads, prod(q_grid), prod(k_grid))
        if not prefix:
            return attention + bias
        lower = torch.cat([attention[:, :, 1:, :1], attention[:, :, 1:, 1:] + bias], 3)
        return torch.cat([attention[:, :, :1], lower], 2)


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


class SubBlock(nn.Module):
    """A norm and what follows it: `attn` or `mlp`."""

    def __init__(self, dim: int, **part: nn.Module) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        [(name, module)] = part.items()
        self.add_module(name, module)


class Fusion(nn.Module):
    """Joins both streams of a reversible network, (B, N, 2 * D): `concat` leaves them as they are,
    `concat_linear_K` (with or without `ln+`) adds an MLP, others halve the channels."""

    def __init__(self, mode: str, dim: int) -> None:
        super().__init__()
        self.mode = mode
        self.fuse_fn: nn.Module | None = None
        if "concat_linear" in mode:
            parts = mode.split("_")
            hidden = int(dim * (float(parts[2]) if len(parts) > 2 else 1.0))
            mlp = Mlp(dim, hidden, dim)
            self.fuse_fn = nn.Sequential(nn.LayerNorm(dim), mlp) if mode[:2] == "ln" else mlp
        elif mode not in ("concat", "add", "max", "min", "avg"):
            raise ValueError(f"no fusion {mode!r}")

    def forward(self, x: Tensor) -> Tensor:
        if self.fuse_fn is not None:
            fused: Tensor = self.fuse_fn(x) + x
            return fused
        if self.mode == "concat":
            return x
        first, second = x.chunk(2, -1)
        match self.mode:
            case "add":
                return first + second
            case "max":
                return torch.maximum(first, second)
            case "min":
                return torch.minimum(first, second)
        return (first + second) / 2


class ReversibleLayer(nn.Module):
    """One layer: `F` attends, `G` is the MLP. Layers with `fusion` join the streams and pool them
    into one; the others keep two.

    Args:
        res_path: how the residual is pooled: `conv`, as queries are, or `max`.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        mlp_ratio: float,
        fusion: str | None,
        res_path: str,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.F: Any = SubBlock(dim, attn=Attention(dim, dim_out, **attention))
        self.G: Any = SubBlock(dim_out, mlp=Mlp(dim_out, int(dim_out * mlp_ratio), dim_out))
        self.prefix, self.conv_path = attention["prefix"], res_path == "conv"
        self.pre_q_fuse = Fusion(fusion, dim) if fusion else None
        self.res_proj = nn.Linear(dim, dim_out) if fusion and dim != dim_out else None
        stride = attention["stride_q"]
        kernel = [step + 1 if step > 1 else step for step in stride]
        pools = bool(fusion) and not self.conv_path
        self.pool_skip = create_pool(dim, kernel, stride, "max") if pools else None

    def attend(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        result: tuple[Tensor, Grid] = self.F.attn(self.F.norm(x), grid)
        return result

    def transform(self, x: Tensor) -> Tensor:
        result: Tensor = self.G.mlp(self.G.norm(x))
        return result

    def forward(self, streams: tuple[Tensor, Tensor], grid: Grid) -> tuple[Any, Grid]:
        """Both streams (B, N, D), or one twice after a fusion."""
        first, second = streams
        if self.pre_q_fuse is None:
            first = first + self.attend(second, grid)[0]
            return (first, second + self.transform(first)), grid
        x = self.pre_q_fuse(torch.cat([first, second], -1))
        attended, new_grid = self.attend(x, grid)
        x = self._residual(x, grid) + attended
        x = x + self.transform(x)
        return (x, x), new_grid

    def _residual(self, x: Tensor, grid: Grid) -> Tensor:
        first = self.F.attn.pool_first
        if self.res_proj is not None and not first:
            x = self.res_proj(x)
        if self.conv_path:
            heads = 1 if self.F.attn.mode == "conv_unshared" else self.F.attn.num_heads
            split = torch.unflatten(x, 2, (heads, -1)).transpose(1, 2)
            pooled, _ = self.F.attn._pool("q", split, grid)
            x = pooled.transpose(1, 2).flatten(2)
        else:
            x = pool_tokens(x[:, None], self.pool_skip, grid, self.prefix)[0][:, 0]
        return self.res_proj(x) if self.res_proj is not None and first else x


class Layers(nn.Module):
    """`layers`, as upstream nests those of a reversible network."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class MultiscaleVit(nn.Module):
    """MViT with timm's `forward_features` and `forward_head`.

    Takes clips (B, 3, T, H, W), or images (B, 3, H, W) as clips of one frame.

    Args:
        size: (T, h, w) tokens after the stem.
        blocks: `dim`, `dim_out`, `num_heads` and pooling of each block.
        stem: `kernel_size`, `stride` and `padding` of the stem's convolution.
        positions: `joint` or `separate` tables of absolute positions, or `none`.
        repeats: how often they are added; upstream adds fixed ones twice.
        mean_pooling: pool before the last norm, over patches alone.
        fuse: how both streams of a reversible network are joined at the end; None for others.
        resized: take clips of other sizes than the relative positions are for.
        attention: options of `Attention`, `Block` or `ReversibleLayer`.
    """

    def __init__(
        self,
        *,
        size: Sequence[int],
        blocks: Sequence[Mapping[str, Any]],
        stem: Mapping[str, Sequence[int]],
        num_classes: int,
        cls_token: bool,
        positions: str,
        repeats: int,
        norm_stem: bool,
        mean_pooling: bool,
        fuse: str | None,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.size: Grid = (int(size[0]), int(size[1]), int(size[2]))
        self.num_classes, self.mean_pooling = num_classes, mean_pooling
        self.num_prefix_tokens = int(cls_token)
        self.repeats, self.fixed_size = repeats, positions != "none" or attention["resized"]
        dim = blocks[0]["stem_dim"]
        sizes: Any = {name: tuple(value) for name, value in stem.items()}
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, dim, **sizes)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if cls_token else None
        if positions == "joint":
            cells = prod(self.size) + self.num_prefix_tokens
            self.pos_embed = nn.Parameter(torch.zeros(1, cells, dim))
        elif positions == "separate":
            plane = self.size[1] * self.size[2]
            self.pos_embed_spatial = nn.Parameter(torch.zeros(1, plane, dim))
            self.pos_embed_temporal = nn.Parameter(torch.zeros(1, self.size[0], dim))
            if cls_token:
                self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = positions
        self.norm_stem = LayerNorm(dim) if norm_stem else None
        layers: list[nn.Module] = []
        kind: Any = Block if fuse is None else ReversibleLayer
        grid = self.size
        for block in blocks:
            settings = {key: value for key, value in block.items() if key != "stem_dim"}
            layers.append(kind(size=grid, prefix=self.num_prefix_tokens, **settings, **attention))
            if stride := block["stride_q"]:
                grid = (grid[0] // stride[0], grid[1] // stride[1], grid[2] // stride[2])
        width = blocks[-1]["dim_out"]
        self.fuse = None
        if fuse is None:
            self.blocks: Any = nn.ModuleList(layers)
        else:
            self.rev_backbone = Layers(layers)
            self.fuse = Fusion(fuse, 2 * width)
            width = 2 * width if "concat" in fuse else width
        self.norm = LayerNorm(width)
        self.head = nn.ModuleDict({"projection": nn.Linear(width, num_classes)})

    def _positions(self) -> Tensor:
        if self.positions == "joint":
            return self.pos_embed
        frames, plane = self.size[0], self.size[1] * self.size[2]
        table = self.pos_embed_spatial.repeat(1, frames, 1)
        table = table + self.pos_embed_temporal.repeat_interleave(plane, 1)
        return torch.cat([self.pos_embed_class, table], 1) if self.num_prefix_tokens else table

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens (B, prefix + T * h * w, D), class token first, then frame by frame: after the last
        norm, unless the mean is pooled before it. Of reversible networks both streams, (.., 2 D).

        Raises:
            InputError: the input has not the size that the positions are for.
        """
        if x.dim() == 4:
            x = x[:, :, None]
        cells = self.patch_embed["proj"](x)
        grid: Grid = (cells.shape[2], cells.shape[3], cells.shape[4])
        if self.fixed_size and grid != self.size:
            raise InputError(
                f"the input has {' x '.join(map(str, grid))} tokens (frames, rows, columns); this "
                f"network takes {' x '.join(map(str, self.size))}"
            )
        x = cells.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        if self.positions != "none":
            for _ in range(self.repeats):
                x = x + self._positions()
        if self.norm_stem is not None:
            x = self.norm_stem(x)
        if self.fuse is None:
            for block in self.blocks:
                x, grid = block(x, grid)
        else:
            streams = (x, x)
            for layer in self.rev_backbone.layers:
                streams, grid = layer(streams, grid)
            x = torch.cat(streams, -1)
            fused: Tensor = self.fuse(x if self.mean_pooling else self.norm(x))
            return fused
        return x if self.mean_pooling else self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or the pooled features (B, D)."""
        if self.mean_pooling:
            x = self.norm(x[:, self.num_prefix_tokens :].mean(1))
        else:
            x = x[:, 0] if self.num_prefix_tokens else x.mean(1)
        result: Tensor = x if pre_logits else self.head["projection"](x)
        return result


NETWORKS = {"mvit": MultiscaleVit}
