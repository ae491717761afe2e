"""Semantic FPN (arXiv 1901.02446)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from models.segmentation.decoders.layers import ConvModule, Pyramid, resize

TYPES = ("FPNHead",)
MARK = "scale_heads.0.0.conv.weight"


class FpnHead(nn.Module):
    """Convolves and upsamples each level to the resolution of the first, and adds."""

    def __init__(
        self, inputs: Sequence[int], channels: int, classes: int, doublings: Sequence[int]
    ) -> None:
        """
        Args:
            doublings: how often each level is upsampled by 2.
        """
        super().__init__()
        self.scale_heads = nn.ModuleList()
        for dim, count in zip(inputs, doublings, strict=True):
            steps: list[nn.Module] = []
            for step in range(max(1, count)):
                steps.append(ConvModule(dim if step == 0 else channels, channels, 3))
                if count:
                    steps.append(nn.Upsample(scale_factor=2, mode="bilinear"))
            self.scale_heads.append(nn.Sequential(*steps))
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Pyramid) -> Tensor:
        summed, *others = [head(x) for head, x in zip(self.scale_heads, maps, strict=True)]
        for x in others:
            summed = summed + resize(x, summed.shape[2:])
        logits: Tensor = self.conv_seg(summed)
        return logits


MAX_STRIDE = 64


def create(
    tensors: Mapping[str, Tensor], inputs: Sequence[int], settings: Mapping[str, Any]
) -> nn.Module:
    """`settings`: `strides` of the levels (each twice the one before)."""
    strides = [int(n) for n in settings.get("strides", [2**n for n in range(len(inputs))])]
    if not strides or not all(1 <= stride <= MAX_STRIDE for stride in strides):
        raise ValueError(f"strides must be numbers from 1 to {MAX_STRIDE}")
    doublings = [(stride // strides[0]).bit_length() - 1 for stride in strides]
    classes, channels = tensors["conv_seg.weight"].shape[:2]
    return FpnHead(inputs, channels, classes, doublings)
