"""Swin (arXiv 2103.14030) for inputs of any size, as segmentation uses it.

Upstream pads each stage's map to whole windows before shifting it. timm shifts first, which gives
other values near the padding. Module names are those of github.com/microsoft/Swin-Transformer, but
that patch merging begins a stage instead of ending the one before.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import get_relative_position_index
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from models.networks.vit import bicubic_rule

MASKED = -100.0  # upstream's, not minus infinity


class WindowAttention(nn.Module):
    """Attention within windows of `window` x `window` cells, with a table of relative positions."""

    index: Tensor

    def __init__(self, dim: int, heads: int, window: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        rows = (2 * window - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        index = get_relative_position_index(window, window)
        self.register_buffer("index", index, persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, windows_BWTD: Tensor, mask_WTT: Tensor | None) -> Tensor:
        split = torch.unflatten(self.qkv(windows_BWTD), -1, (3, self.heads, -1))
        queries, keys, values = split.permute(3, 0, 1, 4, 2, 5).unbind(0)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)[None]
        if mask_WTT is not None:
            bias = bias + mask_WTT[:, None]
        mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        projected: Tensor = self.proj(mixed.transpose(2, 3).flatten(3))
        return projected


class Block(nn.Module):
    """A Swin block on maps (B, h, w, D); `shift` is 0 or half a window."""

    def __init__(
        self, dim: int, heads: int, window: int, shift: int, mlp_ratio: float, *, qkv_bias: bool,
        norm: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = norm(dim)
        self.attn = WindowAttention(dim, heads, window, qkv_bias=qkv_bias)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed

    def _attend(self, x: Tensor) -> Tensor:
        side, shift = self.window, self.shift
        height, width = x.shape[1:3]
        x = pad(x, (0, 0, 0, -width % side, 0, -height % side))
        batch, rows, columns = x.shape[:3]
        mask = None
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            mask = shift_mask(rows, columns, side, x)
        split = x.reshape(batch, rows // side, side, columns // side, side, -1)
        windows = split.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        attended = torch.unflatten(self.attn(windows, mask), 2, (side, side))
        x = torch.unflatten(attended, 1, (rows // side, columns // side))
        x = x.transpose(2, 3).reshape(batch, rows, columns, -1)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :height, :width]


def shift_mask(rows: int, columns: int, side: int, like: Tensor) -> Tensor:
    """(windows, T, T) for windows of `side` cells: MASKED between cells that are neighbours only
    once a map is shifted by half a window. Windows are counted row by row."""

    def parts(length: int) -> Tensor:
        place = torch.arange(length, device=like.device)
        return (place >= length - side).int() + (place >= length - side // 2).int()

    numbers = 3 * parts(rows)[:, None] + parts(columns)
    split = numbers.reshape(rows // side, side, columns // side, side)
    windows = split.transpose(1, 2).reshape(-1, side * side)
    apart = windows[:, None] != windows[:, :, None]
    return apart.to(like.dtype) * MASKED


class Merging(nn.Module):
    """Patch merging: (B, h, w, D) to half the size and twice the channels; odd sides are padded."""

    def __init__(self, dim: int, *, norm: Any) -> None:
        super().__init__()
        self.norm = norm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        corners = [x[:, down::2, across::2] for across in (0, 1) for down in (0, 1)]
        reduced: Tensor = self.reduction(self.norm(torch.cat(corners, -1)))
        return reduced


class Stage(nn.Module):
    """Maps (B, D, h, w) in and out, so that heads can read the output."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.blocks(self.downsample(x.permute(0, 2, 3, 1)))
        return output.permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Patches of an input whose sides are padded to whole ones, (B, D, h, w)."""

    def __init__(self, patch: int, dim: int, *, norm: Any) -> None:
        super().__init__()
        self.patch_size = (patch, patch)
        self.dynamic_img_pad = True  # as timm's: a grid's sides are rounded up
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)
        self.norm = norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        patch = self.patch_size[0]
        x = self.proj(pad(x, (0, -x.shape[3] % patch, 0, -x.shape[2] % patch)))
        embedded: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return embedded


class PaddedSwin(nn.Module):
    """Swin without a classifier.

    Args:
        depths, num_heads: blocks and heads of each stage.
        window_size: cells along a window's side.
        patch_norm: whether a norm follows the patch embedding.
        norm_eps: epsilon of every layer norm.
        positions: the shape of the table of absolute positions, none without one: (1, D, h, w) as
            upstream has it, resized to the input's grid, or (1, N, D) for N patches alone.
    """

    num_classes = 0

    def __init__(
        self,
        *,
        patch_size: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        mlp_ratio: float,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        norm_eps: float = 1e-5,
        positions: Sequence[int] = (),
    ) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, eps=norm_eps)
        table = nn.Parameter(torch.zeros(*positions)) if positions else None
        self.absolute_pos_embed = table
        self.patch_embed = PatchEmbed(
            patch_size, embed_dim, norm=norm if patch_norm else nn.Identity
        )
        stages = []
        for number, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim = embed_dim * 2**number
            blocks = [
                Block(
                    dim, heads, window_size, window_size // 2 * (block % 2), mlp_ratio,
                    qkv_bias=qkv_bias, norm=norm,
                )
                for block in range(depth)
            ]  # fmt: skip
            merging = Merging(dim // 2, norm=norm) if number else nn.Identity()
            stages.append(Stage(merging, blocks))
        self.layers = nn.Sequential(*stages)
        self.num_features = embed_dim * 2 ** (len(stages) - 1)
        self.norm = norm(self.num_features)

    def check_size(self, height: int, width: int) -> str | None:
        """What is wrong with inputs of that size, or None."""
        table, patch = self.absolute_pos_embed, self.patch_embed.patch_size[0]
        cells = -(-height // patch) * -(-width // patch)
        if table is None or table.dim() == 4 or cells == table.shape[1]:
            return None
        return f"its positions are for {table.shape[1]} patches, and it has {cells}"

    def positioned(self, x: Tensor) -> Tensor:
        """The map of patches (B, D, h, w) with their absolute positions, if it has them."""
        table = self.absolute_pos_embed
        if table is None:
            return x
        if table.dim() == 3:
            return x + table.transpose(1, 2).reshape(1, *x.shape[1:])
        return x + bicubic_rule(table, (x.shape[2], x.shape[3]))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map after the norm, (B, D, h, w)."""
        x = self.layers(self.positioned(self.patch_embed(x)))
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The mean over the map, (B, D)."""
        return x.mean((2, 3))


NETWORKS = {"padded-swin": PaddedSwin}
