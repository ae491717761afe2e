"""Fully convolutional heads (FCN, arXiv 1411.4038), and linear ones: those without convolutions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.segmentation.decoders.layers import ConvModule, Pyramid, concatenate, indices

TYPES = ("FCNHead", "BNHead")
MARK = "conv_seg.weight"


class FcnHead(nn.Module):
    """Concatenated levels through convolutions, then a 1x1 convolution."""

    def __init__(
        self, inputs: int, channels: int, classes: int, *, convs: int, size: int, dilation: int,
        concat_input: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.convs = nn.Sequential(
            *(ConvModule(inputs if n == 0 else channels, channels, size, dilation=dilation)
              for n in range(convs))
        )  # fmt: skip
        self.conv_cat = ConvModule(inputs + channels, channels, size) if concat_input else None
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Pyramid) -> Tensor:
        x = concatenate(maps)
        convolved = self.convs(x)
        if self.conv_cat is not None:
            convolved = self.conv_cat(torch.cat([x, convolved], 1))
        logits: Tensor = self.conv_seg(convolved)
        return logits


class LinearHead(nn.Module):
    """Concatenated levels, a batch norm, and a 1x1 convolution: DINOv2's (arXiv 2304.07193)."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv_seg = nn.Conv2d(inputs, classes, 1)

    def forward(self, maps: Pyramid) -> Tensor:
        logits: Tensor = self.conv_seg(self.bn(concatenate(maps)))
        return logits


MAX_DILATION = 64


def create(
    tensors: Mapping[str, Tensor], inputs: Sequence[int], settings: Mapping[str, Any]
) -> nn.Module:
    """`settings`: `dilation` of the convolutions (1)."""
    classes, channels = tensors["conv_seg.weight"].shape[:2]
    dilation = int(settings.get("dilation", 1))
    if not 1 <= dilation <= MAX_DILATION:
        raise ValueError(f"dilation is {dilation}; it can be 1 to {MAX_DILATION}")
    if "bn.weight" in tensors:
        return LinearHead(sum(inputs), classes)
    convs = indices(tensors, "convs.")
    size = tensors["convs.0.conv.weight"].shape[2] if convs else 1
    if (joined := tensors.get("conv_cat.conv.weight")) is not None and not convs:
        size = joined.shape[2]
    return FcnHead(
        sum(inputs),
        channels,
        classes,
        convs=len(convs),
        size=size,
        dilation=dilation,
        concat_input=joined is not None,
    )
