"""What decoders are made of, under mmsegmentation's module names."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, layer_norm

from models.networks.dpt import Conv

# Maps (B, C, h, w), finest first.
Pyramid = Sequence[Tensor]


def resize(x: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """Resize maps to (h, w), without aligned corners."""
    align = {} if mode == "nearest" else {"align_corners": False}
    return interpolate(x, size=tuple(size), mode=mode, **align)


def concatenate(maps: Pyramid) -> Tensor:
    """All maps, resized to the first one's size, as one."""
    size = maps[0].shape[2:]
    return torch.cat([resize(x, size) for x in maps], 1)


def top_down(levels: list[Tensor], mode: str = "nearest") -> list[Tensor]:
    """Add each level, upsampled, to the next finer one, from the coarsest down."""
    for i in range(len(levels) - 1, 0, -1):
        levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[2:], mode)
    return levels


def indices(tensors: Mapping[str, Tensor], prefix: str) -> list[int]:
    """The numbers N of the names `prefix` + `N.`, in order."""
    rest = (key.removeprefix(prefix) for key in tensors if key.startswith(prefix))
    return sorted({int(name.partition(".")[0]) for name in rest})


class ConvModule(nn.Module):
    """A convolution with a batch norm, or else a bias, and with a ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        norm: bool = True,
        activate: bool = True,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, size, padding=size // 2 * dilation, dilation=dilation, bias=not norm
        )
        self.bn: nn.Module = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.activate = nn.ReLU(inplace=True) if activate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.activate(self.bn(self.conv(x)))
        return activated


def use_group_norms(decoder: nn.Module, groups: int) -> None:
    """Replace the batch norms of convolutions by group norms.

    Raises:
        ValueError: the groups do not divide the channels.
    """
    if groups < 1:
        raise ValueError(f"there are {groups} groups of channels; there must be 1 or more")
    for module in decoder.modules():
        if isinstance(module, ConvModule | Conv) and isinstance(module.bn, nn.BatchNorm2d):
            module.bn = nn.GroupNorm(groups, module.bn.num_features)


class Upsample(nn.Module):
    """Bilinear upsampling by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return resize(x, [int(side * self.factor) for side in x.shape[2:]])


class ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of maps (B, C, h, w)."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.permute(0, 2, 3, 1)
        normed = layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)
