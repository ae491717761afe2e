"""Trunks that take clips."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.inputs.images import DEFAULT_LIMITS, ImageLimits
from models.inputs.samples import sample_photos
from models.inputs.transforms import ClipPreprocess
from models.inputs.video import create_clip_transform
from models.trunks.base import Trunk
from models.trunks.devices import Placement
from models.trunks.features import PassPlan
from models.trunks.pixel_input import PixelInput
from models.trunks.timm import TimmPass, TimmTrunk


class ClipInput(PixelInput):
    """Clips (B, T, 3, H, W) uint8, or normalised (B, 3, T, H, W) float, as a network takes them."""

    def forward(self, clips: Tensor) -> Tensor:
        pixels = super().forward(clips)
        return pixels.transpose(1, 2) if clips.dtype == torch.uint8 else pixels


class VideoTrunk(TimmTrunk):
    """A network that takes clips (B, 3, T, H, W)."""

    modality = "video"
    preprocess: ClipPreprocess

    def __init__(
        self, architecture: str, network: nn.Module, preprocess: ClipPreprocess,
        placement: Placement,
    ) -> None:  # fmt: skip
        super().__init__(architecture, network, preprocess, placement)
        self._clip_transform = create_clip_transform(self.preprocess)

    def create_pass(self, plan: PassPlan) -> nn.Module:
        clip_input = ClipInput(self.preprocess, self.placement)
        return TimmPass(self.network, self._hooks, plan, clip_input)

    def prepare(self, item: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Tensor:
        """A `Video` as uint8 (T, 3, H, W)."""
        return self._clip_transform(item.content, limits)

    def collate(self, inputs: Sequence[Tensor], *, pin_memory: bool = False) -> Tensor:
        return Trunk.collate(self, inputs, pin_memory=pin_memory)

    def blank(self) -> Tensor:
        spec = self.preprocess
        return torch.zeros(spec.frames, 3, *spec.input_size, dtype=torch.uint8)

    def samples(self, count: int) -> list[Tensor]:
        frames = [self._transform(photo) for photo in sample_photos(self.preprocess.frames)]
        return [torch.stack(frames[number:] + frames[:number]) for number in range(count)]
