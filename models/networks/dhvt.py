"""DHVT (arXiv 2210.05958, github.com/ArieSeirack/DHVT): a ViT for small data sets.

Each attention head adds a token of its own, and convolutions replace the MLP.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

# By patch size: each convolution of the stem has the embedding width divided by this.
STEMS = {2: (1,), 4: (2, 1), 16: (8, 4, 2, 1)}


class Affine(nn.Module):
    """A learned scale and shift per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha + self.beta


class Stem(nn.Module):
    """Convolutions of stride 2 with batch norms and GELU between them.

    A stem of one convolution also ends in a GELU.
    """

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.pre_affine = Affine(3)
        self.post_affine = Affine(dim)
        layers: list[nn.Module] = []
        inputs = 3
        divisors = STEMS[patch_size]
        for divisor in divisors:
            outputs = dim // divisor
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(convolution, nn.BatchNorm2d(outputs)), nn.GELU()]
            inputs = outputs
        self.proj = nn.Sequential(*(layers if len(divisors) == 1 else layers[:-1]))

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.post_affine(self.proj(self.pre_affine(x)))
        return embedded.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with one additional token per head.

    A head token is computed from the mean of that head's channels. After attention, the mean of the
    head tokens is added to the class token.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.ht_proj = nn.Linear(dim // heads, dim)
        self.ht_norm = nn.LayerNorm(dim // heads)
        self.pos_embed = nn.Parameter(torch.zeros(1, heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        x = torch.cat([x, self._head_tokens(x)], 1)
        split = torch.unflatten(self.qkv(x), -1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = split.unbind(0)
        context = scaled_dot_product_attention(queries, keys, values)
        x = self.proj(context.transpose(1, 2).flatten(2))
        first = x[:, :1] + x[:, count:].mean(1, keepdim=True)
        return torch.cat([first, x[:, 1:count]], 1)

    def _head_tokens(self, x: Tensor) -> Tensor:
        """One token per head, (B, heads, D)."""
        means = torch.unflatten(x.mean(1), -1, (self.heads, -1))
        wide = torch.unflatten(self.ht_proj(means), -1, (self.heads, -1))
        tokens: Tensor = gelu(self.ht_norm(wide)).flatten(2) + self.pos_embed
        return tokens


class FeedForward(nn.Module):
    """Convolutions on the patch grid; their pooled output gates the class token."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, dim, 1)
        self.bn3 = nn.BatchNorm2d(dim)
        self.compress = nn.Linear(dim, dim // 4)
        self.excitation = nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor) -> Tensor:
        first, patches = x[:, :1], x[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        cells = torch.unflatten(patches.transpose(1, 2), 2, (side, side))
        cells = gelu(self.bn1(self.conv1(cells)))
        cells = cells + gelu(self.bn2(self.conv2(cells)))
        patches = self.bn3(self.conv3(cells)).flatten(2).transpose(1, 2)
        weight = self.excitation(gelu(self.compress(patches.mean(1, keepdim=True))))
        return torch.cat([first * weight, patches], 1)


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, dim: int, heads: int, hidden: int, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Dhvt(nn.Module):
    """Square inputs of any multiple of the patch size; only the head tokens have positions."""

    num_prefix_tokens = 1

    def __init__(
        self,
        *,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        hidden: int,
        qkv_bias: bool,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.patch_embed = Stem(embed_dim, patch_size)
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, hidden, qkv_bias) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens after the norm, (B, 1 + N, D), class token first."""
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), patches], 1)
        normed: Tensor = self.norm(self.blocks(tokens))
        return normed

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K), or the class token (B, D)."""
        first = x[:, 0]
        return first if pre_logits else self.head(first)


NETWORKS = {"dhvt": Dhvt}
