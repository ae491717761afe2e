"""Necks between a backbone's maps and a decoder: each turns a pyramid into another."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.segmentation.decoders.layers import ChannelNorm, ConvModule, Pyramid, top_down

# `ConvModule` of (inputs, outputs, size).
Conv = Callable[[int, int, int], nn.Module]
# Levels that are made of as many maps of a plain ViT, and their factors in mmsegmentation's
# Feature2Pyramid, in its names.
LEVELS = 4
PYRAMID_STEPS = ("upsample_4x", "upsample_2x", "identity", "downsample_2x")
COARSE_STEPS = ("upsample_2x", "identity", "downsample_2x", "downsample_4x")


def check_plain(inputs: Sequence[int]) -> None:
    """
    Raises:
        ValueError: there are not as many of a plain ViT's maps as a pyramid has levels.
    """
    if len(inputs) != LEVELS:
        raise ValueError(f"the neck makes {LEVELS} levels of as many maps, not of {len(inputs)}")


class BeitNeck(nn.Module):
    """Four maps on a plain ViT's grid to strides 4, 8, 16 and 32."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        double = partial(nn.ConvTranspose2d, dim, dim, 2, stride=2)
        if patch == 16:
            self.fpn1 = nn.Sequential(double(), nn.BatchNorm2d(dim), nn.GELU(), double())
            self.fpn2 = nn.Sequential(double())
            self.fpn3: nn.Module = nn.Identity()
            self.fpn4 = nn.MaxPool2d(2)
        else:
            self.fpn1 = nn.Sequential(double())
            self.fpn2 = nn.Sequential(nn.Identity())
            self.fpn3 = nn.MaxPool2d(2)
            self.fpn4 = nn.MaxPool2d(4)

    def forward(self, maps: Pyramid) -> Pyramid:
        steps = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [step(x) for step, x in zip(steps, maps, strict=True)]


class TinyMimNeck(nn.Module):
    """The levels of TinyMIM*-T (arXiv 2301.01296), with four times the channels of a small ViT.

    The last map passes through a layer that its fine-tuning added behind the blocks.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        double = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        wide = 2 * dim
        self.fpn1 = nn.Sequential(
            double(dim, wide), nn.BatchNorm2d(wide), nn.GELU(), double(wide, 4 * dim)
        )
        self.fpn2 = nn.Sequential(double(dim, 4 * dim))
        self.fpn3 = nn.Conv2d(dim, 4 * dim, 1)
        self.conv1x1 = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU())
        self.fpn4 = nn.Sequential(nn.Conv2d(hidden, 4 * dim, 3, stride=2, padding=1))

    def forward(self, maps: Pyramid) -> Pyramid:
        first, second, third, last = maps
        last = self.conv1x1(last.movedim(1, -1)).movedim(-1, 1)
        return [self.fpn1(first), self.fpn2(second), self.fpn3(third), self.fpn4(last)]


class FeaturePyramid(nn.Module):
    """mmsegmentation's Feature2Pyramid: `BeitNeck` under other names."""

    def __init__(self, dim: int, *, from_four: bool) -> None:
        """
        Args:
            from_four: the factors are 4, 2, 1 and 1/2; otherwise 2, 1, 1/2 and 1/4.
        """
        super().__init__()
        double = partial(nn.ConvTranspose2d, dim, dim, 2, stride=2)
        if from_four:
            self.upsample_4x = nn.Sequential(double(), nn.BatchNorm2d(dim), nn.GELU(), double())
        self.upsample_2x = nn.Sequential(double())
        self.identity = nn.Identity()
        self.downsample_2x = nn.MaxPool2d(2)
        self.downsample_4x = nn.MaxPool2d(4)
        self._steps = PYRAMID_STEPS if from_four else COARSE_STEPS

    def forward(self, maps: Pyramid) -> Pyramid:
        return [self.get_submodule(n)(x) for n, x in zip(self._steps, maps, strict=True)]


class LevelNorms(nn.Module):
    """One layer norm per level of a hierarchical trunk, where the levels' names end in `numbers`"""

    def __init__(self, dims: Sequence[int], numbers: Sequence[int], eps: float) -> None:
        super().__init__()
        for number, dim in zip(numbers, dims, strict=True):
            self.add_module(f"norm{number}", ChannelNorm(dim, eps=eps))

    def forward(self, maps: Pyramid) -> Pyramid:
        return [norm(x) for norm, x in zip(self.children(), maps, strict=True)]


class FpnNeck(nn.Module):
    """A feature pyramid network (arXiv 1612.03144)."""

    def __init__(self, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        plain = partial(ConvModule, norm=False, activate=False)
        self.lateral_convs = nn.ModuleList(plain(n, channels, 1) for n in inputs)
        self.fpn_convs = nn.ModuleList(plain(channels, channels, 3) for _ in inputs)

    def forward(self, maps: Pyramid) -> Pyramid:
        levels = top_down([conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)])
        return [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]


class MultiLevelNeck(nn.Module):
    """A plain ViT's maps resized by `scales`, between two convolutions. One map stands for all."""

    def __init__(
        self, inputs: Sequence[int], channels: int, scales: Sequence[float], conv: Conv
    ) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.lateral_convs = nn.ModuleList(conv(n, channels, 1) for n in inputs)
        self.convs = nn.ModuleList(conv(channels, channels, 3) for _ in scales)

    def forward(self, maps: Pyramid) -> Pyramid:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        if len(levels) == 1:
            levels = levels * len(self.scales)
        resized = [
            interpolate(x, scale_factor=scale, mode="bilinear")
            for x, scale in zip(levels, self.scales, strict=True)
        ]
        return [conv(x) for conv, x in zip(self.convs, resized, strict=True)]


# Most levels of a `MultiLevelNeck`, and their largest scale.
MAX_SCALES, MAX_SCALE = 64, 16


class MlaNeck(nn.Module):
    """SETR's multi-level feature aggregation (arXiv 2012.15840): sums from the last map down."""

    def __init__(self, inputs: Sequence[int], channels: int, eps: float, conv: Conv) -> None:
        super().__init__()
        self.norm = nn.ModuleList(ChannelNorm(n, eps=eps) for n in inputs)
        self.mla = nn.Module()
        self.mla.channel_proj = nn.ModuleList(conv(n, channels, 1) for n in inputs)
        self.mla.feat_extract = nn.ModuleList(conv(channels, channels, 3) for _ in inputs)

    def forward(self, maps: Pyramid) -> Pyramid:
        projections: Any = self.mla.channel_proj
        extractions: Any = self.mla.feat_extract
        levels = [
            project(norm(x)) for project, norm, x in zip(projections, self.norm, maps, strict=True)
        ]
        summed = [levels[-1]]
        for level in levels[-2::-1]:
            summed.append(summed[-1] + level)
        return [extract(x) for extract, x in zip(extractions, summed, strict=True)]


def create_neck(
    tensors: Mapping[str, Tensor], inputs: Sequence[int], settings: Mapping[str, Any]
) -> tuple[nn.Module, list[int]] | None:
    """The neck without its weights, and the channels of its maps; None if there is none.

    Args:
        tensors: those of the neck, under their names in it.
        inputs: the channels of each map.
        settings: `scales` of a `MultiLevelNeck`; `neck_norm_eps` of an `MlaNeck` (1e-6); of both
            `neck_activates`, whether a ReLU follows their convolutions (false).

    Raises:
        KeyError: a tensor or a setting is missing.
        ValueError: no neck has such names.
    """
    if not tensors:
        return None
    activate = bool(settings.get("neck_activates", False))
    if "mla.channel_proj.0.conv.weight" in tensors:
        width = tensors["mla.channel_proj.0.conv.weight"].shape[0]
        eps = float(settings.get("neck_norm_eps", 1e-6))
        conv = partial(
            ConvModule, norm="mla.channel_proj.0.bn.weight" in tensors, activate=activate
        )
        return MlaNeck(inputs, width, eps, conv), [width] * len(inputs)
    if "upsample_2x.0.weight" in tensors:
        check_plain(inputs)
        from_four = "upsample_4x.0.weight" in tensors
        return FeaturePyramid(inputs[0], from_four=from_four), list(inputs)
    if "lateral_convs.0.conv.weight" not in tensors:
        raise ValueError(f"no neck has tensors named {', '.join(list(tensors)[:5])}")
    width = tensors["lateral_convs.0.conv.weight"].shape[0]
    if "convs.0.conv.weight" not in tensors:
        return FpnNeck(inputs, width), [width] * len(inputs)
    scales = [float(n) for n in settings["scales"]]
    if len(scales) > MAX_SCALES or not all(0 < scale <= MAX_SCALE for scale in scales):
        raise ValueError(f"scales must be up to {MAX_SCALES} numbers up to {MAX_SCALE}")
    conv = partial(ConvModule, norm="lateral_convs.0.bn.weight" in tensors, activate=activate)
    return MultiLevelNeck(inputs, width, scales, conv), [width] * len(scales)


class SelectLevels(nn.Module):
    """A selection of the levels, in the order of their numbers in `levels`."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = list(levels)

    def forward(self, maps: Pyramid) -> Pyramid:
        return [maps[level] for level in self.levels]


class Steps(nn.Module):
    """Maps (B, C, h, w) of a trunk's blocks or stages through named steps, one after another."""

    def __init__(self, steps: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, step in steps.items():
            self.add_module(name, step)

    def forward(self, maps: Pyramid) -> Tensor:
        x: Any = maps
        for step in self.children():
            x = step(x)
        result: Tensor = x
        return result
