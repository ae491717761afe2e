"""PyramidTNT (arXiv 2201.00978, github.com/huawei-noah/Efficient-AI-Backbones).

Each patch ("sentence") holds 4 x 4 finer tokens ("words"); both run through four pyramid stages.
Shape suffixes: B images, N patches, M words of a patch, C channels of a word, D of a patch.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

WORDS = 4  # words along each side of a patch


def _convolution(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


class Stem(nn.Module):
    """Words (B * N, M, C) at half the resolution, and patches (B, N, D) at an eighth."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.patch_size = (8, 8)
        self.common_conv = nn.Sequential(*_convolution(3, 2 * inner, 2))
        self.inner_convs = nn.Sequential(*_convolution(2 * inner, inner, 1))
        self.outer_convs = nn.Sequential(
            *_convolution(2 * inner, 4 * inner, 2),
            *_convolution(4 * inner, 8 * inner, 2),
            *_convolution(8 * inner, outer, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.common_conv(x)
        words = self.inner_convs(x).unfold(2, WORDS, WORDS).unfold(3, WORDS, WORDS)
        words_NMC = words.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(0, 2)
        patches: Tensor = self.outer_convs(x)
        return words_NMC, patches.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention; keys and values come from patches averaged over `reduction` squared cells."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, reduction: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.reduction = reduction
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.linear = nn.Linear(dim, dim)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        queries = torch.unflatten(self.q(x), -1, (self.heads, -1)).transpose(1, 2)
        split = torch.unflatten(self.kv(self._context(x)), -1, (2, self.heads, -1))
        keys, values = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
        if positions is not None:
            scores = scores + positions
        context = scores.softmax(-1) @ values
        result: Tensor = self.proj(context.transpose(1, 2).flatten(2))
        return result

    def _context(self, x: Tensor) -> Tensor:
        """The tokens that keys and values are computed from."""
        if self.reduction == 1:
            return x
        side = round(x.shape[1] ** 0.5)
        cells = torch.unflatten(x.transpose(1, 2), 2, (side, side))
        pooled = avg_pool2d(cells, self.reduction).flatten(2).transpose(1, 2)
        reduced: Tensor = self.norm(self.linear(pooled))
        return reduced


class Block(nn.Module):
    """Attention among words, added to their patch where there is one, then among patches."""

    def __init__(
        self, inner: int, outer: int, heads: tuple[int, int], reduction: int, has_inner: bool,
        mlp_ratio: float, qkv_bias: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.has_inner = has_inner
        if has_inner:
            flat = WORDS * WORDS * inner
            self.inner_norm1 = nn.LayerNorm(flat)
            self.inner_attn = Attention(inner, heads[0], qkv_bias)
            self.inner_norm2 = nn.LayerNorm(flat)
            self.inner_mlp = Mlp(inner, int(inner * mlp_ratio))
            self.proj_norm1 = nn.LayerNorm(flat)
            self.proj = nn.Linear(flat, outer, bias=False)
            self.proj_norm2 = nn.LayerNorm(outer)
        self.outer_norm1 = nn.LayerNorm(outer)
        self.outer_attn = Attention(outer, heads[1], qkv_bias, reduction)
        self.outer_norm2 = nn.LayerNorm(outer)
        self.outer_mlp = Mlp(outer, int(outer * mlp_ratio))

    def forward(self, words: Tensor, patches: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        batch, count = patches.shape[:2]
        if self.has_inner:
            shape = words.shape
            flat = words.reshape(batch, count, -1)
            words = words + self.inner_attn(self.inner_norm1(flat).reshape(shape))
            flat = words.reshape(batch, count, -1)
            words = words + self.inner_mlp(self.inner_norm2(flat).reshape(shape))
            flat = words.reshape(batch, count, -1)
            patches = patches + self.proj_norm2(self.proj(self.proj_norm1(flat)))
        patches = patches + self.outer_attn(self.outer_norm1(patches), positions)
        patches = patches + self.outer_mlp(self.outer_norm2(patches))
        return words, patches


class Stage(nn.Module):
    """Blocks that share one table of relative positions.

    The first block has an inner attention, and in stages of more than 6 blocks also the second.
    """

    def __init__(self, count: int, depth: int, reduction: int, **sizes: Any) -> None:
        super().__init__()
        self.relative_pos = nn.Parameter(
            torch.zeros(1, sizes["heads"][1], count, count // reduction**2)
        )
        inner = {0, 1} if depth > 6 else {0}
        self.blocks = nn.ModuleList(
            Block(reduction=reduction, has_inner=number in inner, **sizes)
            for number in range(depth)
        )

    def forward(self, words: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            words, patches = block(words, patches, self.relative_pos)
        return words, patches


class WordMerge(nn.Module):
    """The words of 2 x 2 patches to those of one, by a convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.conv = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1))

    def forward(self, words: Tensor, side: int) -> Tensor:
        x = self.norm(words).reshape(-1, side // 2, 2, side // 2, 2, WORDS, WORDS, words.shape[-1])
        x = x.permute(0, 1, 3, 7, 2, 5, 4, 6).flatten(6, 7).flatten(4, 5).flatten(0, 2)
        merged: Tensor = self.conv(x).flatten(2).transpose(1, 2)
        return merged


class SentenceMerge(nn.Module):
    """Patches to half as many in each direction, by a convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.conv = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1))

    def forward(self, patches: Tensor, side: int) -> Tensor:
        cells = torch.unflatten(self.norm(patches).transpose(1, 2), 2, (side, side))
        merged: Tensor = self.conv(cells).flatten(2).transpose(1, 2)
        return merged


class PyramidTnt(nn.Module):
    """Square inputs of one size, a multiple of 64. Sequences have one entry per stage.

    Args:
        inner_dims: channels of a word.
        outer_dims: channels of a patch.
        reductions: side of the cells that keys and values are averaged over.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        *,
        img_size: int,
        depths: Sequence[int],
        inner_dims: Sequence[int],
        outer_dims: Sequence[int],
        inner_heads: Sequence[int],
        outer_heads: Sequence[int],
        reductions: Sequence[int],
        mlp_ratio: float,
        qkv_bias: bool,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.side = img_size // 8
        self.patch_embed = Stem(inner_dims[0], outer_dims[0])
        self.outer_pos = nn.Parameter(torch.zeros(1, self.side**2, outer_dims[0]))
        self.inner_pos = nn.Parameter(torch.zeros(1, WORDS**2, inner_dims[0]))
        self.stages = nn.ModuleList(
            Stage(
                (self.side // 2**number) ** 2,
                depths[number],
                reductions[number],
                inner=inner_dims[number],
                outer=outer_dims[number],
                heads=(inner_heads[number], outer_heads[number]),
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
            )
            for number in range(4)
        )
        steps = list(itertools.pairwise(inner_dims))
        self.word_merges = nn.ModuleList(WordMerge(*step) for step in steps)
        steps = list(itertools.pairwise(outer_dims))
        self.sentence_merges = nn.ModuleList(SentenceMerge(*step) for step in steps)
        self.norm = nn.LayerNorm(outer_dims[-1])
        self.head = nn.Linear(outer_dims[-1], num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage after the norm, (B, D, h, w)."""
        words, patches = self.patch_embed(x)
        words, patches = words + self.inner_pos, patches + self.outer_pos
        side = self.side
        for number, stage in enumerate(self.stages):
            if number:
                words = self.word_merges[number - 1](words, side)
                patches = self.sentence_merges[number - 1](patches, side)
                side //= 2
            words, patches = stage(words, patches)
        normed = self.norm(patches)
        return torch.unflatten(normed.transpose(1, 2), 2, (side, side))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or the mean patch (B, D)."""
        mean = x.mean((2, 3))
        return mean if pre_logits else self.head(mean)


NETWORKS = {"pyramid-tnt": PyramidTnt}
