"""PatchConvNet (arXiv 2112.13692, github.com/facebookresearch/deit).

A convolutional trunk without pyramid, and attention pooling of its patches into one class token, or
into one token per class.
"""

from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

STRIDE = 16


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: channels of (B, D, h, w) gated by their means."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(dim, round(dim / 4), 1)
        self.conv_expand = nn.Conv2d(round(dim / 4), dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv_expand(self.conv_reduce(x.mean((2, 3), keepdim=True)).relu())
        gated: Tensor = x * gate.sigmoid()
        return gated


class Branch(nn.Module):
    """The convolutions of a block, on tokens (B, N, D) of a square grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv_pos = nn.Sequential(
            nn.Conv2d(dim, dim, 1),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim),
            nn.GELU(),
            SqueezeExcite(dim),
            nn.Conv2d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        side = round(x.shape[1] ** 0.5)
        cells = torch.unflatten(x.transpose(1, 2), 2, (side, side))
        result: Tensor = self.qkv_pos(cells).flatten(2).transpose(1, 2)
        return result


class Column(nn.Module):
    """A residual block of the column."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Branch(dim)
        self.gamma_1 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.gamma_1 * self.attn(self.norm1(x))
        return result


class Gathering(nn.Module):
    """Cross-attention from class tokens (queries) to context tokens (keys and values)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def probabilities(self, classes: Tensor, context: Tensor) -> Tensor:
        """Attention probabilities (B, heads, classes, context)."""
        queries, keys = self._split(self.q(classes)), self._split(self.k(context))
        scale: float = keys.shape[-1] ** -0.5
        return (queries @ keys.transpose(-2, -1) * scale).softmax(-1)

    def forward(self, classes: Tensor, context: Tensor) -> Tensor:
        pooled = self.probabilities(classes, context) @ self._split(self.v(context))
        result: Tensor = self.proj(pooled.transpose(1, 2).flatten(2))
        return result

    def _split(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)


class Aggregation(nn.Module):
    """Attention pooling: several class tokens attend to patches, a single one also to itself."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Gathering(dim, heads)
        self.gamma_1 = nn.Parameter(torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.gamma_2 = nn.Parameter(torch.ones(dim))

    def sides(self, classes: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """The queries' and the context's tokens, both normalised."""
        queries, context = self.norm1(classes), self.norm1(patches)
        return queries, torch.cat([queries, context], 1) if queries.shape[1] == 1 else context

    def forward(self, classes: Tensor, patches: Tensor) -> Tensor:
        classes = classes + self.gamma_1 * self.attn(*self.sides(classes, patches))
        result: Tensor = classes + self.gamma_2 * self.mlp(self.norm2(classes))
        return result


class PatchConvNet(nn.Module):
    """Square inputs of any multiple of 16; there are no positions."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        depth_token_only: int,
        num_heads: int,
        mlp_ratio: float,
        num_classes: int,
        class_tokens: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_prefix_tokens = class_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, class_tokens, embed_dim))
        self.patch_embed = Stem(embed_dim)
        self.blocks = nn.Sequential(*(Column(embed_dim) for _ in range(depth)))
        self.blocks_token_only = nn.ModuleList(
            Aggregation(embed_dim, num_heads, mlp_ratio) for _ in range(depth_token_only)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head: nn.Module
        if class_tokens > 1:
            self.head = nn.ModuleList(nn.Linear(embed_dim, 1) for _ in range(class_tokens))
        else:
            self.head = nn.Linear(embed_dim, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the norm, (B, classes + N, D), class tokens first."""
        patches = self.blocks(self.patch_embed(x))
        classes = self.cls_token.expand(x.shape[0], -1, -1)
        for block in self.blocks_token_only:
            classes = block(classes, patches)
        normed: Tensor = self.norm(torch.cat([classes, patches], 1))
        return normed

    def last_attention(self, x: Tensor) -> Tensor:
        """The last pooling's attention, (B, heads, 1, 1 + N) or (B, heads, classes, N)."""
        patches = self.blocks(self.patch_embed(x))
        classes = self.cls_token.expand(x.shape[0], -1, -1)
        last: Any = self.blocks_token_only[-1]
        for block in self.blocks_token_only[:-1]:
            classes = block(classes, patches)
        attention: Tensor = last.attn.probabilities(*last.sides(classes, patches))
        return attention

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or the mean of the class tokens (B, D)."""
        classes = x[:, : self.num_prefix_tokens]
        if pre_logits:
            return classes.mean(1)
        if isinstance(self.head, nn.ModuleList):
            scores = [head(classes[:, number]) for number, head in enumerate(self.head)]
            return torch.cat(scores, 1)
        logits: Tensor = self.head(classes[:, 0])
        return logits


class Stem(nn.Module):
    """Four convolutions of stride 2 with GELU between them: patches of 16 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.patch_size = (STRIDE, STRIDE)
        layers: list[nn.Module] = []
        inputs = 3
        for divisor in (8, 4, 2, 1):
            convolution = nn.Conv2d(inputs, dim // divisor, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(convolution), nn.GELU()]
            inputs = dim // divisor
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return embedded


NETWORKS = {"patchconvnet": PatchConvNet}
