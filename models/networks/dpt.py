"""What dense prediction transformers (DPT, arXiv 2103.13413) are made of, under mmsegmentation's
module names.

A level is a plain ViT's patches with the class token's channels behind each patch's,
(B, 2 D, h, w).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, relu

# How a level's class tokens reach its patches: projected with them, added to them, or not at all.
Readout = Literal["project", "add", "ignore"]


class Conv(nn.Module):
    """A convolution under mmcv's name for it, behind a ReLU if it is to `preactivate`, and with a
    batch norm or else, unless told otherwise, a bias."""

    def __init__(
        self, inputs: int, outputs: int, size: int, *, bias: bool = True, norm: bool = False,
        preactivate: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.preactivate = preactivate
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias and not norm)
        self.bn: nn.Module = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.bn(self.conv(relu(x) if self.preactivate else x))
        return convolved


class Residual(nn.Module):
    """Two convolutions, and a shortcut."""

    def __init__(self, dim: int, *, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = Conv(dim, dim, 3, bias=False, norm=norm, preactivate=True)
        self.conv2 = Conv(dim, dim, 3, bias=False, norm=norm, preactivate=True)

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = x + self.conv2(self.conv1(x))
        return summed


class Fusion(nn.Module):
    """Adds a finer map to a coarser one, and doubles the size."""

    def __init__(self, dim: int, *, is_first: bool, norm: bool = False) -> None:
        super().__init__()
        self.res_conv_unit1 = None if is_first else Residual(dim, norm=norm)
        self.res_conv_unit2 = Residual(dim, norm=norm)
        self.project = Conv(dim, dim, 1)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if self.res_conv_unit1 is not None and finer is not None:
            if finer.shape != x.shape:
                finer = interpolate(finer, size=x.shape[2:], mode="bilinear")
            x = x + self.res_conv_unit1(finer)
        x = self.res_conv_unit2(x)
        raised = interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        projected: Tensor = self.project(raised)
        return projected


class Reassemble(nn.Module):
    """Four levels of a plain ViT to strides 4, 8, 16 and 32 of patches of 16."""

    def __init__(self, dim: int, channels: Sequence[int], readout: Readout) -> None:
        super().__init__()
        self.projects = nn.ModuleList(Conv(dim, n, 1) for n in channels)
        first, second, _, last = channels
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(last, last, 3, stride=2, padding=1),
            ]
        )
        self.readout = readout
        if readout == "project":
            self.readout_projects = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * dim, dim)) for _ in channels
            )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        maps = []
        for number, level in enumerate(levels):
            x, tokens = level.chunk(2, 1)
            if self.readout == "project":
                mixed = gelu(self.readout_projects[number](level.movedim(1, -1)))
                x = mixed.movedim(-1, 1)
            elif self.readout == "add":
                x = x + tokens
            maps.append(self.resize_layers[number](self.projects[number](x)))
        return maps


class Fusions(nn.Module):
    """The part that decoders of depth and of segmentation share: levels to a map (B, C, h, w) of
    half the input's resolution."""

    def __init__(
        self, dim: int, channels: Sequence[int], width: int, readout: Readout, *,
        norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.reassemble_blocks = Reassemble(dim, channels, readout)
        self.convs = nn.ModuleList(Conv(n, width, 3, bias=False) for n in channels)
        self.fusion_blocks = nn.ModuleList(
            Fusion(width, is_first=number == 0, norm=norm) for number in range(len(channels))
        )
        self.project = Conv(width, width, 3, norm=norm)

    def fused(self, levels: Sequence[Tensor]) -> Tensor:
        """The map, behind its last ReLU."""
        maps = self.reassemble_blocks(levels)
        convolved = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        x = self.fusion_blocks[0](convolved.pop())
        for fuse in list(self.fusion_blocks)[1:]:
            x = fuse(x, convolved.pop())
        return relu(self.project(x))


def with_class_token(patches_BDhw: Tensor, token_BD: Tensor) -> Tensor:
    """A level: the patches' map with the class token's channels behind its own."""
    return torch.cat([patches_BDhw, token_BD[:, :, None, None].expand_as(patches_BDhw)], 1)
