"""Trunks that take clips."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.inputs.images import DEFAULT_LIMITS, ImageLimits
from models.inputs.samples import sample_photos
from models.inputs.transforms import ClipPreprocess
from models.inputs.types import Video
from models.inputs.video import decode_clip
from models.trunks.base import Trunk
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

    def create_pass(self, plan: PassPlan) -> TimmPass:
        clip_input = ClipInput(self.preprocess, self.placement)
        return TimmPass(self.network, self._hooks, plan, clip_input)

    def prepare(self, item: Any, limits: ImageLimits = DEFAULT_LIMITS) -> Tensor:
        """A `Video`, or the frames of its `choice` as images, as uint8 (T, 3, H, W)."""
        if isinstance(item, Video):
            item = decode_clip(item.content, self.preprocess.choice, limits)
        return torch.stack([self._transform(frame) for frame in item])

    def collate(self, inputs: Sequence[Tensor], *, pin_memory: bool = False) -> Tensor:
        return Trunk.collate(self, inputs, pin_memory=pin_memory)

    def blank(self) -> Tensor:
        spec = self.preprocess
        return torch.zeros(spec.frames, 3, *spec.input_size, dtype=torch.uint8)

    def samples(self, count: int) -> list[Tensor]:
        frames = [self._transform(photo) for photo in sample_photos(self.preprocess.frames)]
        return [torch.stack(frames[number:] + frames[:number]) for number in range(count)]
