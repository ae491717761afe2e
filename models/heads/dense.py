"""Segmentation by any labels: each patch of a CLIP is compared with their texts (MaskCLIP, arXiv
2112.01071)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.functional import pil_to_tensor

from models.errors import CatalogError
from models.heads.prompted import Prompted
from models.heads.segment import Segment
from models.networks.dense_clip import can_be_dense
from models.segmentation.label_sets import palette_of
from models.trunks.base import Trunk, TrunkOutput
from models.trunks.features import Need

LONGEST = 4  # times the shorter side


@dataclass(frozen=True, slots=True)
class WholePatches:
    """An image as it is, its shorter side brought to `side` pixels, each side then to a multiple of
    the patch; no side is longer than LONGEST times that."""

    side: int
    patch: int

    def cut(self, image: Image.Image) -> list[Tensor]:
        factor = self.side / min(image.size)
        width, height = (self._whole(min(n * factor, LONGEST * self.side)) for n in image.size)
        return [pil_to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))]

    def merge(
        self, rows: Sequence[Mapping[str, np.ndarray]], size: tuple[int, int]
    ) -> Mapping[str, np.ndarray]:
        return rows[0]

    def _whole(self, length: float) -> int:
        return max(1, round(length / self.patch)) * self.patch


class DenseClip(Prompted, Segment):
    """`scale` is what cosines are multiplied with before the softmax. The trunk's input is doubled:
    twice as fine a grid as it was trained with."""

    softmax = False

    def __init__(
        self,
        trunk: Trunk,
        scale: float,
        templates: Sequence[str],
        labels: Sequence[str] = (),
    ) -> None:
        """
        Raises:
            CatalogError: a tower of another kind.
        """
        if not can_be_dense(trunk.network):
            raise CatalogError(f"{trunk.architecture} is no plain ViT of a CLIP")
        super().__init__(trunk, labels)
        self.scale = scale
        self.templates = tuple(templates)
        patch: Any = trunk.network.conv1
        side = 2 * min(trunk.preprocess.input_size)
        self.view = WholePatches(side, int(patch.kernel_size[0]))

    def needs(self, rows: Sequence[int]) -> Need:
        return Need(dense=True)

    def check(self, options: Mapping[str, Any]) -> None:
        self.check_prompt(options)

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        """`dense` (B, D, h, w) of unit length."""
        assert output.dense is not None
        return {"dense": normalize(output.dense.float(), dim=1)}

    def finish(
        self,
        row: Mapping[str, np.ndarray],
        size: tuple[int, int],
        *,
        classes: np.ndarray | None = None,
        labels: Sequence[str] = (),
        threshold: float | None = None,
        min_area: int = 0,
        output: str = "png",
        image: Image.Image | None = None,
    ) -> dict[str, np.ndarray]:
        """As `Segment.finish`, for these labels; `logits` are probabilities here."""
        assert classes is not None
        found = probabilities(torch.from_numpy(row["dense"]), torch.from_numpy(classes), self.scale)
        palette = palette_of(labels)
        return self.answer(found.numpy(), labels, palette, size, threshold, min_area, output, image)

    def run(self, pixels: Tensor, classes_KD: Tensor | None) -> dict[str, Tensor]:
        """By upstream's names: `feature_map` (B, D, h, w); and with the labels' embeddings
        `mask_logits`, the cosines (B, K, h, w), `mask_logits_fullres` (B, K, H, W) of them, and
        `mask_probabilities`."""
        output = self.trunk.forward(pixels, Need(dense=True))
        features = self.forward(output)["dense"]
        named = {"feature_map": features}
        if classes_KD is not None:
            cosines = torch.einsum("kd,bdhw->bkhw", normalize(classes_KD, dim=-1), features)
            full = torch.nn.functional.interpolate(
                cosines, size=pixels.shape[2:], mode="bilinear", align_corners=False
            )
            named |= {
                "mask_logits": cosines,
                "mask_logits_fullres": full,
                "mask_probabilities": (self.scale * cosines).softmax(1),
            }
        return named


def probabilities(dense_Dhw: Tensor, classes_KD: Tensor, scale: float) -> Tensor:
    """(K, h, w): a softmax over the classes for each patch."""
    cosines = torch.einsum("kd,dhw->khw", classes_KD, dense_Dhw)
    return (scale * cosines).softmax(0)
