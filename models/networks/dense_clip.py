"""Dense CLIP (MaskCLIP, arXiv 2112.01071): a text-aligned embedding for every patch.

In the last block each patch keeps its own value vector instead of attending to the others; the
residual connection and the MLP stay. Upstream is github.com/chongzhou96/MaskCLIP.
"""

from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear


def can_be_dense(network: nn.Module) -> bool:
    """Whether an image tower is OpenAI's plain ViT as open_clip builds it."""
    plain = isinstance(network, VisionTransformer) and network.attn_pool is None
    return plain and network.proj is not None and not network.final_ln_after_pool


def dense_pass(network: Any, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """The image embedding (B, D) and the patch embeddings (B, D, h, w), not normalised.

    The position table is resized to the input's grid.
    """
    patches = network.conv1(pixels_BCHW)
    batch, _, rows, columns = patches.shape
    first = network.class_embedding.expand(batch, 1, -1).to(patches.dtype)
    x = torch.cat([first, patches.flatten(2).transpose(1, 2)], 1)
    x = network.ln_pre(x + positions(network.positional_embedding, (rows, columns)).to(x.dtype))
    *blocks, last = network.transformer.resblocks
    if not network.transformer.batch_first:
        x = x.transpose(0, 1)
    for block in blocks:
        x = block(x)
    values = linear(last.ln_1(x), *_value_projection(last.attn))
    dense = x + last.ls_1(last.attn.out_proj(values))
    dense = dense + last.ls_2(last.mlp(last.ln_2(dense)))
    tokens = last(x)
    if not network.transformer.batch_first:
        dense, tokens = dense.transpose(0, 1), tokens.transpose(0, 1)
    embedding = network._pool(tokens)[0] @ network.proj
    projected = network.ln_post(dense[:, 1:]) @ network.proj
    return embedding, projected.transpose(1, 2).reshape(batch, -1, rows, columns)


def positions(table_ND: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1 + h * w, D): the table resized to a grid of (h, w) cells, class token first."""
    side = round((len(table_ND) - 1) ** 0.5)
    if grid == (side, side):
        return table_ND
    cells = table_ND[1:].T.reshape(1, -1, side, side)
    resized = interpolate(cells, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table_ND[:1], resized[0].flatten(1).T])


def _value_projection(attention: nn.MultiheadAttention) -> tuple[Tensor, Tensor]:
    assert attention.in_proj_weight is not None
    third = attention.embed_dim
    return attention.in_proj_weight[-third:], attention.in_proj_bias[-third:]
