"""Layers of reversible MViTs (Reversible Vision Transformers, CVPR 2022)."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from models.networks.pooling_attention import Attention, Grid, LayerNorm, create_pool, pool_tokens


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
