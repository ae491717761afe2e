"""UPerNet (arXiv 1807.10221), and PSPNet's head (arXiv 1612.01105), whose pooling it has."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.segmentation.decoders.layers import (
    ConvModule,
    Pyramid,
    concatenate,
    resize,
    top_down,
)

TYPES = ("UPerHead", "PSPHead")
MARK = "psp_modules.0.1.conv.weight"
FUSION = "fpn_bottleneck.conv.weight"
MAX_POOL = 64


class PspHead(nn.Module):
    """Pools a map at several scales, which it sees together with the map."""

    def __init__(
        self, inputs: int, channels: int, classes: int, pool_scales: Sequence[int]
    ) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(inputs, channels, 1))
            for scale in pool_scales
        )
        self.bottleneck = ConvModule(inputs + len(pool_scales) * channels, channels, 3)
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def pooled(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) of the map."""
        maps = [resize(module(x), x.shape[2:]) for module in self.psp_modules]
        bottled: Tensor = self.bottleneck(torch.cat([x, *maps], 1))
        return bottled

    def forward(self, maps: Pyramid) -> Tensor:
        logits: Tensor = self.conv_seg(self.pooled(concatenate(maps)))
        return logits


class UperHead(PspHead):
    """Pools the coarsest level, and fuses all levels at the finest."""

    def __init__(
        self, inputs: Sequence[int], channels: int, classes: int, pool_scales: Sequence[int]
    ) -> None:
        super().__init__(inputs[-1], channels, classes, pool_scales)
        self.lateral_convs = nn.ModuleList(ConvModule(n, channels, 1) for n in inputs[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in inputs[:-1])
        self.fpn_bottleneck = ConvModule(len(inputs) * channels, channels, 3)

    def forward(self, maps: Pyramid) -> Tensor:
        *finer, top = maps
        levels = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.pooled(top))
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
    if FUSION not in tensors:
        return PspHead(sum(inputs), channels, classes, scales)
    return UperHead(inputs, channels, classes, scales)
