"""Decoders and necks under mmsegmentation's module names: feature pyramids to class logits.

UPerNet (arXiv 1807.10221), Semantic FPN (arXiv 1901.02446), and a linear layer behind a batch norm,
as in DINOv2's linear evaluation (arXiv 2304.07193). A pyramid is a sequence of maps (B, C, h, w),
finest first.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import interpolate

Pyramid = Sequence[Tensor]

MAX_POOL = 64


def resize(x: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """Resize maps to (h, w), without aligned corners."""
    align = {} if mode == "nearest" else {"align_corners": False}
    return interpolate(x, size=tuple(size), mode=mode, **align)


class ConvModule(nn.Module):
    """A convolution with a batch norm and a ReLU, or with a bias alone if it is `plain`."""

    def __init__(self, inputs: int, outputs: int, size: int, *, plain: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=plain)
        self.bn = nn.Identity() if plain else nn.BatchNorm2d(outputs)
        self.activate = nn.Identity() if plain else nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        activated: Tensor = self.activate(self.bn(self.conv(x)))
        return activated


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


class LevelNorms(nn.Module):
    """One layer norm per level of a hierarchical trunk."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        for level, dim in enumerate(dims):
            self.add_module(f"norm{level}", LayerNorm2d(dim, eps=1e-6))

    def forward(self, maps: Pyramid) -> Pyramid:
        return [norm(x) for norm, x in zip(self.children(), maps, strict=True)]


class FpnNeck(nn.Module):
    """A feature pyramid network (arXiv 1612.03144)."""

    def __init__(self, inputs: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(n, channels, 1, plain=True) for n in inputs)
        self.fpn_convs = nn.ModuleList(
            ConvModule(channels, channels, 3, plain=True) for _ in inputs
        )

    def forward(self, maps: Pyramid) -> Pyramid:
        levels = _top_down([conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)])
        return [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=True)]


def _top_down(levels: list[Tensor], mode: str = "nearest") -> list[Tensor]:
    """Add each level, upsampled, to the next finer one, from the coarsest down."""
    for i in range(len(levels) - 1, 0, -1):
        levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[2:], mode)
    return levels


class UperHead(nn.Module):
    """UPerNet: pools the coarsest level at several scales, and fuses all levels at the finest."""

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
        levels = _top_down(levels, "bilinear")
        smoothed = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)]
        size = levels[0].shape[2:]
        resized = [resize(x, size) for x in (*smoothed, levels[-1])]
        logits: Tensor = self.conv_seg(self.fpn_bottleneck(torch.cat(resized, 1)))
        return logits


class FpnHead(nn.Module):
    """Semantic FPN: convolves and upsamples each level to the resolution of the first, and adds."""

    def __init__(self, inputs: Sequence[int], channels: int, classes: int) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for level, dim in enumerate(inputs):
            steps: list[nn.Module] = []
            for step in range(max(1, level)):
                steps.append(ConvModule(dim if step == 0 else channels, channels, 3))
                if level:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.scale_heads.append(nn.Sequential(*steps))
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Pyramid) -> Tensor:
        summed, *others = [head(x) for head, x in zip(self.scale_heads, maps, strict=True)]
        for x in others:
            summed = summed + resize(x, summed.shape[2:])
        logits: Tensor = self.conv_seg(summed)
        return logits


class LinearHead(nn.Module):
    """Concatenated levels, a batch norm, and a 1x1 convolution."""

    def __init__(self, inputs: Sequence[int], classes: int, *, norm: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(sum(inputs)) if norm else nn.Identity()
        self.conv_seg = nn.Conv2d(sum(inputs), classes, 1)

    def forward(self, maps: Pyramid) -> Tensor:
        size = maps[0].shape[2:]
        stacked = torch.cat([resize(x, size) for x in maps], 1)
        logits: Tensor = self.conv_seg(self.bn(stacked))
        return logits


class SelectLevels(nn.Module):
    """A selection of the levels, in the order of their numbers in `levels`."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = list(levels)

    def forward(self, maps: Pyramid) -> Pyramid:
        return [maps[level] for level in self.levels]


class Decoder(nn.Module):
    """Maps (B, C, h, w) of a trunk's blocks or stages to logits (B, K, h, w), by steps in order."""

    def __init__(self, steps: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, step in steps.items():
            self.add_module(name, step)

    def forward(self, maps: Pyramid) -> Tensor:
        x: Any = maps
        for step in self.children():
            x = step(x)
        logits: Tensor = x
        return logits


def create_decoder(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Decoder:
    """A decoder without its weights, from the names and shapes of its tensors.

    Args:
        tensors: `levels.*` (a `BeitNeck` or `LevelNorms`, optional), `neck.*` (an `FpnNeck`,
            optional) and `decode_head.*`.
        settings: `inputs`, the channels of each map; `patch`, the patch size, for a `BeitNeck`;
            `in_index`, the levels that the head reads (all); `pool_scales` of UPerNet (1, 2, 3, 6).

    Raises:
        KeyError: a tensor or a setting is missing.
        ValueError: `pool_scales` are out of range.
    """
    inputs = [int(n) for n in settings["inputs"]]
    head = {k.removeprefix("decode_head."): v for k, v in tensors.items() if "decode_head." in k}
    classes = head["conv_seg.weight"].shape[0]
    channels = head["conv_seg.weight"].shape[1]
    steps: dict[str, nn.Module] = {}
    if any(key.startswith("levels.fpn1.") for key in tensors):
        steps["levels"] = BeitNeck(inputs[0], int(settings["patch"]))
    elif "levels.norm0.weight" in tensors:
        steps["levels"] = LevelNorms(inputs)
    if "neck.lateral_convs.0.conv.weight" in tensors:
        width = tensors["neck.lateral_convs.0.conv.weight"].shape[0]
        steps["neck"] = FpnNeck(inputs, width)
        inputs = [width] * len(inputs)
    selected = [int(n) for n in settings.get("in_index", range(len(inputs)))]
    if selected != list(range(len(inputs))):
        steps["selected"] = SelectLevels(selected)
        inputs = [inputs[level] for level in selected]
    if "fpn_bottleneck.conv.weight" in head:
        scales = [int(n) for n in settings.get("pool_scales", (1, 2, 3, 6))]
        if not all(1 <= scale <= MAX_POOL for scale in scales):
            raise ValueError(f"pool_scales are {scales}; they can be 1 to {MAX_POOL}")
        steps["decode_head"] = UperHead(inputs, channels, classes, scales)
    elif any(key.startswith("scale_heads.") for key in head):
        steps["decode_head"] = FpnHead(inputs, channels, classes)
    else:
        steps["decode_head"] = LinearHead(inputs, classes, norm="bn.weight" in head)
    return Decoder(steps)
