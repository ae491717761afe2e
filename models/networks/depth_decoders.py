"""DINOv2's decoders of depth (arXiv 2304.07193, github.com/facebookresearch/dinov2).

They read blocks of a plain ViT, each as its patches' map (B, D, h, w) and its class token (B, D),
and return depth (B, 1, h', w'). Module names are the checkpoints'.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, relu

Level = tuple[Tensor, Tensor]

SHIFT = 0.1  # added to each bin's score, so that their sum is never 0


class LinearDepth(nn.Module):
    """Scores of evenly spaced depths for each patch; the depth is their mean, weighted by score.

    Args:
        inputs: channels of all levels, class tokens included.
        bins: how many depths there are from `minimum` to `maximum` metres.
        upsample: the factor by which maps are resized before they are scored.
    """

    def __init__(
        self, inputs: int, bins: int, *, minimum: float, maximum: float, upsample: int
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.range = (minimum, maximum)
        self.conv_depth = nn.Conv2d(inputs, bins, 1)

    def forward(self, levels: Sequence[Level]) -> Tensor:
        first = levels[0][0]
        size = [side * self.upsample for side in first.shape[2:]]
        joined = [
            torch.cat([patches, token[:, :, None, None].expand_as(patches)], 1)
            for patches, token in levels
        ]
        resized = [interpolate(x, size=size, mode="bilinear") for x in joined]
        scores = relu(self._scores(torch.cat(resized, 1))) + SHIFT
        shares = scores / scores.sum(1, keepdim=True)
        depths = torch.linspace(*self.range, shares.shape[1], device=shares.device)
        return torch.einsum("bkhw,k->bhw", shares, depths.to(shares))[:, None].clamp(*self.range)

    def _scores(self, x: Tensor) -> Tensor:
        """The convolution as a plain matrix product, whose sums do not depend on the number of
        threads: at 80 m the last bits of float32 are more than 1e-5."""
        weight, bias = self.conv_depth.weight.flatten(1), self.conv_depth.bias
        assert bias is not None
        batch, columns = x.shape[0], x.flatten(2)
        biases = bias[None, :, None].expand(batch, -1, columns.shape[2])
        products = torch.baddbmm(biases, weight.expand(batch, -1, -1), columns)
        return torch.unflatten(products, 2, tuple(x.shape[2:]))


class Conv(nn.Module):
    """A convolution under mmcv's name for it, behind a ReLU if it is to `preactivate`."""

    def __init__(
        self, inputs: int, outputs: int, size: int, *, bias: bool = True, preactivate: bool = False
    ) -> None:
        super().__init__()
        self.preactivate = preactivate
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.conv(relu(x) if self.preactivate else x)
        return convolved


class Residual(nn.Module):
    """Two convolutions, and a shortcut."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = Conv(dim, dim, 3, bias=False, preactivate=True)
        self.conv2 = Conv(dim, dim, 3, bias=False, preactivate=True)

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = x + self.conv2(self.conv1(x))
        return summed


class Fusion(nn.Module):
    """Adds a finer map to a coarser one, and doubles the size."""

    def __init__(self, dim: int, *, is_first: bool) -> None:
        super().__init__()
        self.res_conv_unit1 = None if is_first else Residual(dim)
        self.res_conv_unit2 = Residual(dim)
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
    """Four levels of a plain ViT to strides 4, 8, 16 and 32 of patches of 16; class tokens are
    projected into the patches, if there are weights for that."""

    def __init__(self, dim: int, channels: Sequence[int], *, readout: bool) -> None:
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
        if readout:
            self.readout_projects = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * dim, dim)) for _ in channels
            )
        self._readout = readout

    def forward(self, levels: Sequence[Level]) -> list[Tensor]:
        maps = []
        for number, (patches, token) in enumerate(levels):
            x = patches
            if self._readout:
                tokens = patches.flatten(2).transpose(1, 2)
                both = torch.cat([tokens, token[:, None].expand_as(tokens)], -1)
                mixed = gelu(self.readout_projects[number](both))
                x = mixed.transpose(1, 2).reshape(patches.shape)
            maps.append(self.resize_layers[number](self.projects[number](x)))
        return maps


class DepthHead(nn.Module):
    """The last convolutions, (B, C, h, w) to (B, 1, 2h, 2w)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(dim, dim // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(dim // 2, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        depth: Tensor = self.head(x)
        return depth


class DptDepth(nn.Module):
    """A dense prediction transformer's decoder (DPT, arXiv 2103.13413) of four levels."""

    def __init__(
        self, dim: int, channels: Sequence[int], width: int, hidden: int, *, minimum: float,
        maximum: float, readout: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.range = (minimum, maximum)
        self.reassemble_blocks = Reassemble(dim, channels, readout=readout)
        self.convs = nn.ModuleList(Conv(n, width, 3, bias=False) for n in channels)
        self.fusion_blocks = nn.ModuleList(
            Fusion(width, is_first=number == 0) for number in range(len(channels))
        )
        self.project = Conv(width, width, 3)
        self.conv_depth = DepthHead(width, hidden)

    def forward(self, levels: Sequence[Level]) -> Tensor:
        maps = self.reassemble_blocks(levels)
        convolved = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        x = self.fusion_blocks[0](convolved.pop())
        for fuse in list(self.fusion_blocks)[1:]:
            x = fuse(x, convolved.pop())
        depth = relu(self.conv_depth(relu(self.project(x)))) + self.range[0]
        return depth.clamp(*self.range)


def create_depth_decoder(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> nn.Module:
    """A decoder without its weights.

    Args:
        settings: `minimum` and `maximum` in metres; `upsample` of a `LinearDepth`.

    Raises:
        KeyError: a tensor or a setting is missing.
    """
    limits = {"minimum": float(settings["minimum"]), "maximum": float(settings["maximum"])}
    if "conv_depth.weight" in tensors:
        bins, inputs = tensors["conv_depth.weight"].shape[:2]
        return LinearDepth(inputs, bins, **limits, upsample=int(settings["upsample"]))
    projects = [tensors[f"reassemble_blocks.projects.{n}.conv.weight"].shape for n in range(4)]
    return DptDepth(
        projects[0][1],
        [shape[0] for shape in projects],
        tensors["project.conv.weight"].shape[0],
        tensors["conv_depth.head.2.weight"].shape[0],
        **limits,
        readout="reassemble_blocks.readout_projects.0.0.weight" in tensors,
    )
