"""MViT v1 and v2 (arXiv 2104.11227, 2112.01526), and their reversible form (CVPR 2022).

Parameters have the names of github.com/facebookresearch/SlowFast, whose configurations these
arguments are read from. Images are clips of one frame. timm and torchvision have a few of the
options each; here are all that published models use.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import InputError
from models.networks.pooling_attention import Attention, Block, Grid, LayerNorm
from models.networks.reversible import Fusion, Layers, ReversibleLayer


class MultiscaleVit(nn.Module):
    """MViT with timm's `forward_features` and `forward_head`.

    Takes clips (B, 3, T, H, W), or images (B, 3, H, W) as clips of one frame.

    Args:
        size: (T, h, w) tokens after the stem.
        blocks: `dim`, `dim_out`, `num_heads` and pooling of each block.
        stem: `kernel_size`, `stride` and `padding` of the stem's convolution.
        positions: `joint` or `separate` tables of absolute positions, or `none`.
        repeats: how often they are added; upstream adds fixed ones twice.
        norm: whether there is a last norm.
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
        norm: bool = True,
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
        grid = self.size  # strides need not divide it, as the tables' sizes suppose
        for layer in self.modules():
            if isinstance(layer, Attention):
                grid = layer.set_grid(grid)
        self.norm = LayerNorm(width) if norm else nn.Identity()
        self.head = nn.ModuleDict()
        if num_classes:
            self.head["projection"] = nn.Linear(width, num_classes)

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
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
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
        result: Tensor = x if pre_logits or not self.num_classes else self.head["projection"](x)
        return result


NETWORKS = {"mvit": MultiscaleVit}
