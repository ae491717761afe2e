"""The steps of timm's ViT blocks, for tokens that pass through them beside the image's.

Shape suffixes: B rows, S query tokens of a row, T tokens, K image tokens, E channels of `qkv`,
D embedding, h attention heads, d channels per head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention


def project(block: Any, raw_TD: Tensor) -> Tensor:
    """(T, h, d): the attention queries of a block for tokens (T, D)."""
    attention = block.attn
    bias = attention.qkv.bias
    size = attention.num_heads * attention.head_dim
    queries = linear(
        block.norm1(raw_TD), attention.qkv.weight[:size], None if bias is None else bias[:size]
    )
    projected: Tensor = attention.q_norm(torch.unflatten(queries, -1, (attention.num_heads, -1)))
    return projected


def keys_values(block: Any, qkv_BKE: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, h, K, d), from what the block's `qkv` layer returned."""
    attention = block.attn
    split = torch.unflatten(qkv_BKE, -1, (3, attention.num_heads, attention.head_dim))
    _, keys, values = split.permute(2, 0, 3, 1, 4).unbind(0)
    return attention.k_norm(keys), values


def attention_map(block: Any, qkv_BKE: Tensor, first: int | None = None) -> Tensor:
    """(B, h, K, K) attention probabilities of a block; (B, h, first, K) of the first tokens."""
    attention = block.attn
    split = torch.unflatten(qkv_BKE, -1, (3, attention.num_heads, attention.head_dim))
    queries, keys, _ = split.permute(2, 0, 3, 1, 4).unbind(0)
    queries = attention.q_norm(queries[:, :, :first]) * attention.scale
    keys = attention.k_norm(keys)
    probabilities: Tensor = (queries @ keys.transpose(-2, -1)).softmax(-1)
    return probabilities


def attend(projected_BShd: Tensor, keys_BhKd: Tensor, values_BhKd: Tensor) -> Tensor:
    """(B, S, h * d): the attention output of query tokens, each row's over its own image tokens."""
    context = scaled_dot_product_attention(projected_BShd.transpose(1, 2), keys_BhKd, values_BhKd)
    return context.transpose(1, 2).flatten(2)


def finish_block(block: Any, raw: Tensor, context: Tensor) -> Tensor:
    """The rest of a block for tokens (..., D) with their attention output (..., h * d)."""
    attention = block.attn
    x = raw + block.ls1(attention.proj(attention.norm(context)))
    finished: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return finished
