"""UPerNet (arXiv 1807.10221)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.segmentation.decoders.layers import ConvModule, Pyramid, resize, top_down

TYPES = ("UPerHead",)
MARK = "fpn_bottleneck.conv.weight"
MAX_POOL = 64


class UperHead(nn.Module):
    """Pools the coarsest level at several scales, and fuses all levels at the finest."""

    def __init__(
        self, inputs: Sequence[int], channels: int, classes: int, pool_scales: Sequence[int]
    ) -> None:
        super().__init__()
        top = inputs[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(top, channels, 1))
            for scale in pool_scales
        )
        self.bottleneck = ConvModule(top + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(n, channels, 1) for n in inputs[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in inputs[:-1])
        self.fpn_bottleneck = ConvModule(len(inputs) * channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Pyramid) -> Tensor:
        *finer, top = maps
        pooled = [resize(module(top), top.shape[2:]) for module in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], 1)))
        levels = top_down(levels, "bilinear")
        smoothed = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)]
        size = levels[0].shape[2:]
        resized = [resize(x, size) for x in (*smoothed, levels[-1])]
        logits: Tensor = self.conv_seg(self.fpn_bottleneck(torch.cat(resized, 1)))
        return logits


def create(
    tensors: Mapping[str, Tensor], inputs: Sequence[int], settings: Mapping[str, Any]
) -> nn.Module:
    """`settings`: `pool_scales` (1, 2, 3, 6).

    Raises:
        ValueError: `pool_scales` are out of range.
    """
    scales = [int(n) for n in settings.get("pool_scales", (1, 2, 3, 6))]
    if len(scales) > MAX_POOL or not all(1 <= scale <= MAX_POOL for scale in scales):
        raise ValueError(f"pool_scales must be up to {MAX_POOL} numbers from 1 to {MAX_POOL}")
    classes, channels = tensors["conv_seg.weight"].shape[:2]
    return UperHead(inputs, channels, classes, scales)
