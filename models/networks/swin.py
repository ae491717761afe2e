"""timm's Swin (arXiv 2103.14030) as self-supervised methods use it: another norm epsilon, and
access to block outputs and attention.
"""

from functools import partial
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer, window_partition
from torch import Tensor, nn


class Swin(SwinTransformer):  # type: ignore[misc]
    """timm's Swin; `norm_eps` is the epsilon of every layer norm."""

    def __init__(self, *, norm_eps: float = 1e-6, **arguments: Any) -> None:
        super().__init__(norm_layer=partial(nn.LayerNorm, eps=norm_eps), **arguments)

    def block_outputs(self, pixels_BCHW: Tensor) -> tuple[list[Tensor], Tensor]:
        """Each block's output (B, h, w, D), and the input of the last block.

        Outputs of the last stage are after the final norm.
        """
        x = self.patch_embed(pixels_BCHW)
        outputs: list[Tensor] = []
        last_input = x
        for number, stage in enumerate(self.layers):
            x = stage.downsample(x)
            for block in stage.blocks:
                last_input = x
                x = block(x)
                last = number == len(self.layers) - 1
                outputs.append(self.norm(x) if last else x)
        return outputs, last_input

    def block_means(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """The means over `block_outputs`' maps, (B, D) each."""
        return [output.mean((1, 2)) for output in self.block_outputs(pixels_BCHW)[0]]

    def last_attention(self, input_BhwD: Tensor) -> Tensor:
        """The last block's attention probabilities, (B * windows, heads, T, T), for its input."""
        block = self.layers[-1].blocks[-1]
        shifts = tuple(-shift for shift in block.shift_size)
        x = torch.roll(block.norm1(input_BhwD), shifts, (1, 2))
        windows = window_partition(x, block.window_size).flatten(1, 2)
        attention = block.attn
        split = torch.unflatten(attention.qkv(windows), -1, (3, attention.num_heads, -1))
        queries, keys, _ = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (queries * attention.scale) @ keys.transpose(-2, -1)
        scores = scores + attention._get_rel_pos_bias()
        if block.attn_mask is not None:
            count = len(block.attn_mask)
            masked = torch.unflatten(scores, 0, (-1, count)) + block.attn_mask[None, :, None]
            scores = masked.flatten(0, 1)
        probabilities: Tensor = scores.softmax(-1)
        return probabilities


NETWORKS = {"swin": Swin}
