"""Segmentation by labels given as texts: each patch of a CLIP is compared with them (MaskCLIP,
arXiv 2112.01071)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from torchvision.transforms.functional import pil_to_tensor

from models.checkpoints.checkpoint import HeadState
from models.errors import CatalogError
from models.heads.prompted import Prompted, Similarity
from models.heads.segment import MaskOptions, Segment
from models.reference_outputs import Parts
from models.segmentation.label_sets import palette_of
from models.trunks.base import Trunk
from models.trunks.features import FeatureRequest, merge
from models.trunks.output import TrunkOutput
from models.trunks.text import TextTrunk

LONGEST = 4  # times the shorter side
# MaskCLIP's code multiplies cosines by this, whatever the checkpoint's own scale.
DENSE_SCALE = 100.0


@dataclass(frozen=True, slots=True)
class WholePatches:
    """A view of the whole image, resized to whole patches.

    Args:
        side: pixels of the shorter side. The longer one has at most LONGEST times as many.
        patch: pixels of a patch's side, which each side is a multiple of.
    """

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
    """The trunk's input is twice the size that it was trained with, for a finer grid."""

    kind = "dense-clip"
    state_name = "dense"
    softmax = False
    request = FeatureRequest(dense=True)

    def __init__(
        self,
        trunk: Trunk,
        scale: float,
        templates: Sequence[str],
        labels: Sequence[str] = (),
    ) -> None:
        """
        Args:
            scale: multiplies cosines before the softmax.

        Raises:
            CatalogError: a tower of another kind.
        """
        if not trunk.has_dense:
            raise CatalogError(f"{trunk.architecture} is not the plain ViT of a CLIP")
        super().__init__(trunk, labels)
        self.scale = scale
        self.templates = tuple(templates)
        self.view = WholePatches(2 * min(trunk.preprocess.input_size), trunk.patch_size[0])

    @classmethod
    def create_prompted(
        cls,
        image: Trunk,
        text: TextTrunk,
        similarity: Similarity | None,
        *,
        state: HeadState | None = None,
        join: Any = None,
        templates: Sequence[str],
        labels: Sequence[str] = (),
    ) -> Self:
        scale = DENSE_SCALE if state is None else float(state.settings["scale"])
        return cls(image, scale, templates, labels)

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
        image: Image.Image | None = None,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """As `Segment.finish`, for these labels. `logits` are probabilities here."""
        assert classes is not None
        maps = probabilities(torch.from_numpy(row["dense"]), torch.from_numpy(classes), self.scale)
        mask_options = MaskOptions(**options)
        return self.answer(maps.numpy(), labels, palette_of(labels), size, mask_options, image)

    def reference_outputs(self, parts: Parts, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By upstream's names: `text_embedding`, `image_embedding` and `feature_map` (B, D, h, w),
        of unit length; of both inputs `mask_logits`, the cosines (B, K, h, w),
        `mask_logits_fullres` (B, K, H, W), and `mask_probabilities`."""
        named: dict[str, Tensor] = {}
        if (token_ids := inputs.get("token_ids")) is not None:
            named["text_embedding"] = normalize(parts.embed_texts(token_ids), dim=-1)
        if (pixels := inputs.get("pixel_values")) is None:
            return named
        output = self.trunk.forward(pixels, merge([(self.request, range(len(pixels)))]))
        features = self.forward(output)["dense"]
        named["image_embedding"] = normalize(self.trunk.pool(output), dim=-1)
        named["feature_map"] = features
        if "text_embedding" in named:
            cosines = torch.einsum("kd,bdhw->bkhw", named["text_embedding"], features)
            full = interpolate(cosines, size=pixels.shape[2:], mode="bilinear", align_corners=False)
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
