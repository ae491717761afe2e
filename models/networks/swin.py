"""timm's Swin (arXiv 2103.14030) as self-supervised methods use it: another norm epsilon, inputs of
other sizes, and access to block outputs and attention.
"""

from functools import partial
from typing import Any

import torch
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.nn.functional import pad


class PaddedBlock(SwinTransformerBlock):  # type: ignore[misc]
    """A block that pads maps to whole windows before it shifts them, as upstream does; timm pads
    them after, so that other cells meet in the windows at the border."""

    def windows(self, x_BhwD: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """Shifted windows (B * N, T, D), the mask that keeps them apart, and the padded size."""
        height, width, channels = x_BhwD.shape[1:]
        rows, columns = self.window_size
        x = pad(x_BhwD, (0, 0, 0, -width % columns, 0, -height % rows))
        size = (x.shape[1], x.shape[2])
        mask = None
        if any(self.shift_size):
            x = torch.roll(x, (-self.shift_size[0], -self.shift_size[1]), (1, 2))
            mask = self.attn_mask
            if len(mask) * rows * columns != size[0] * size[1] or size[0] != size[1]:
                mask = self.get_attn_mask(x)
        return window_partition(x, self.window_size).view(-1, rows * columns, channels), mask, size

    def _attn(self, x: Tensor) -> Tensor:
        windows, mask, size = self.windows(x)
        attended = self.attn(windows, mask=mask).unflatten(1, self.window_size)
        result: Tensor = window_reverse(attended, self.window_size, *size)
        if any(self.shift_size):
            result = torch.roll(result, self.shift_size, (1, 2))
        return result[:, : x.shape[1], : x.shape[2]].contiguous()


class Swin(SwinTransformer):  # type: ignore[misc]
    """timm's Swin; `norm_eps` is the epsilon of every layer norm."""

    def __init__(self, *, norm_eps: float = 1e-6, **arguments: Any) -> None:
        norm_layer = partial(nn.LayerNorm, eps=norm_eps)
        super().__init__(norm_layer=norm_layer, strict_img_size=False, **arguments)
        for stage in self.layers:
            for block in stage.blocks:
                block.__class__ = PaddedBlock  # timm has no argument for the blocks' class
                block.dynamic_mask = False  # the mask of the usual size is made once
                block.init_non_persistent_buffers()

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
        windows, mask, _ = block.windows(block.norm1(input_BhwD))
        attention = block.attn
        split = torch.unflatten(attention.qkv(windows), -1, (3, attention.num_heads, -1))
        queries, keys, _ = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (queries * attention.scale) @ keys.transpose(-2, -1)
        scores = scores + attention._get_rel_pos_bias()
        if mask is not None:
            masked = torch.unflatten(scores, 0, (-1, len(mask))) + mask[None, :, None]
            scores = masked.flatten(0, 1)
        probabilities: Tensor = scores.softmax(-1)
        return probabilities


NETWORKS = {"swin": Swin}
