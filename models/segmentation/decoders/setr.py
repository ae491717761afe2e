"""SETR's heads (arXiv 2012.15840): naive and progressive upsampling of a map, and MLA's of four."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.segmentation.decoders.layers import ChannelNorm, ConvModule, Pyramid, Upsample, indices

TYPES = ("SETRUPHead", "SETRMLAHead")
MARK = "up_convs.0.0.conv.weight"


class SetrUpHead(nn.Module):
    """A layer norm, then convolutions of which each is followed by an upsampling."""

    def __init__(
        self, inputs: int, channels: int, classes: int, *, convs: int, size: int, scale: float,
        norm_eps: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm = ChannelNorm(inputs, eps=norm_eps)
        self.up_convs = nn.Sequential(
            *(nn.Sequential(ConvModule(inputs if n == 0 else channels, channels, size),
                            Upsample(scale))
              for n in range(convs))
        )  # fmt: skip
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Pyramid) -> Tensor:
        [x] = maps
        logits: Tensor = self.conv_seg(self.up_convs(self.norm(x)))
        return logits


class SetrMlaHead(nn.Module):
    """Two convolutions and an upsampling of each map, concatenated."""

    def __init__(
        self, inputs: Sequence[int], channels: int, joined: int, classes: int, *, scale: float
    ) -> None:
        super().__init__()
        self.up_convs = nn.ModuleList(
            nn.Sequential(
                ConvModule(n, channels, 3), ConvModule(channels, channels, 3), Upsample(scale)
            )
            for n in inputs
        )
        self.conv_seg = nn.Conv2d(joined, classes, 1)

    def forward(self, maps: Pyramid) -> Tensor:
        raised = [conv(x) for conv, x in zip(self.up_convs, maps, strict=True)]
        logits: Tensor = self.conv_seg(torch.cat(raised, 1))
        return logits


MAX_SCALE = 32


def create(
    tensors: Mapping[str, Tensor], inputs: Sequence[int], settings: Mapping[str, Any]
) -> nn.Module:
    """`settings`: `up_scale`, and `norm_eps` (1e-6).

    Raises:
        KeyError: there is no `up_scale`, which no shape determines.
    """
    scale = float(settings["up_scale"])
    if not 0 < scale <= MAX_SCALE:
        raise ValueError(f"up_scale is {scale}; it can be up to {MAX_SCALE}")
    classes, joined = tensors["conv_seg.weight"].shape[:2]
    first = tensors[MARK]
    if "norm.weight" not in tensors:
        return SetrMlaHead(inputs, first.shape[0], joined, classes, scale=scale)
    if len(inputs) != 1:
        raise ValueError(f"in_index has {len(inputs)} levels; the head reads one")
    return SetrUpHead(
        inputs[0],
        joined,
        classes,
        convs=len(indices(tensors, "up_convs.")),
        size=first.shape[2],
        scale=scale,
        norm_eps=float(settings.get("norm_eps", 1e-6)),
    )
