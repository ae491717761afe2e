"""Foreground masks without training: from what a self-supervised ViT attends to, or from a
normalised cut of the graph of its patches."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from scipy.linalg import eigh
from scipy.ndimage import label as connected
from torch import Tensor
from torch.nn.functional import normalize

from models.checkpoints.checkpoint import HeadState
from models.errors import CatalogError
from models.heads.segment import BINARY, Segment
from models.trunks.base import Trunk
from models.trunks.output import TrunkOutput

# DINO keeps the patches that have 60 % of the attention.
ATTENTION_THRESHOLD = 0.4
# TokenCut's: patches are joined where the cosine of their features is above TAU.
TAU = 0.2
APART = 1e-5


class AttentionMask(Segment):
    """DINO's thresholded attention (arXiv 2104.14294): a patch is foreground if the patches with
    more attention have less than a share of the whole attention, 1 - `threshold` (0.4)."""

    kind = "attention-mask"

    def __init__(self, trunk: Trunk, labels: Sequence[str] = ()) -> None:
        """
        Raises:
            CatalogError: the trunk has no class token whose attention can be read.
        """
        request = trunk.attention_request()
        if request is None or not trunk.blocks:
            raise CatalogError(f"{trunk.architecture} has no attention that can be read")
        super().__init__(trunk, labels or BINARY)
        self.request = request

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        return cls(trunk, labels)

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        """`rank` (B, h, w): 1 minus the share of attention on patches that have more of it."""
        attention = self.trunk.class_attention(output).flatten(2).mean(1)
        attention = attention / attention.sum(1, keepdim=True)
        ordered, order = attention.sort(1, descending=True)
        before = ordered.cumsum(1) - ordered
        rank = (1 - before).gather(1, order.argsort(1))
        return {"rank": rank.reshape(-1, *output.grid)}

    def map_of(self, row: Mapping[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
        return row["rank"]

    def finish(
        self, row: Mapping[str, np.ndarray], size: tuple[int, int], **options: Any
    ) -> dict[str, np.ndarray]:
        """As `Segment.finish`."""
        return super().finish(row, size, **{"threshold": ATTENTION_THRESHOLD, **options})


class TokenCut(Segment):
    """A normalised cut of the graph of patches (arXiv 2202.11539): the connected region around the
    patch that differs most from the others."""

    kind = "tokencut"

    def __init__(self, trunk: Trunk, labels: Sequence[str] = ()) -> None:
        """
        Raises:
            CatalogError: the trunk yields no features of places.
        """
        if not trunk.has_tokens:
            raise CatalogError(f"{trunk.architecture} yields one embedding, without patches")
        super().__init__(trunk, labels or BINARY)

    @classmethod
    def create(cls, trunk: Trunk, labels: Sequence[str], state: HeadState | None) -> Self:
        return cls(trunk, labels)

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        """`patches` (B, D, h, w) of unit length."""
        return {"patches": normalize(output.feature_map_BChw.float(), dim=1)}

    def map_of(self, row: Mapping[str, np.ndarray], size: tuple[int, int]) -> np.ndarray:
        """Computed over the patches that show the image: padding would differ most."""
        features = row["patches"]
        left, top, right, bottom = self.region(size)
        rows = _inside(features.shape[1], top, bottom, size[1])
        columns = _inside(features.shape[2], left, right, size[0])
        shown = features[:, rows, columns]
        mask = cut(shown.reshape(len(shown), -1).T, shown.shape[1:])
        beyond = [
            (part.start, length - part.stop)
            for part, length in zip((rows, columns), features.shape[1:], strict=True)
        ]
        # a cell at the border may show some of the image
        return np.pad(mask, beyond, mode="edge")


def _inside(cells: int, start: float, end: float, length: int) -> slice:
    """The cells of a map from `start` to `end` whose middles are within `length` pixels."""
    middles = start + (np.arange(cells) + 0.5) * (end - start) / cells
    within = np.flatnonzero((middles >= 0) & (middles <= length))
    if len(within) == 0:  # slivers: the nearest one
        within = np.array([np.abs(middles - length / 2).argmin()])
    return slice(int(within[0]), int(within[-1]) + 1)


def cut(features_ND: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """(h, w) float32, 1 for patches of the foreground."""
    if len(features_ND) < 3:
        return np.zeros(grid, np.float32)
    joined = np.where(features_ND @ features_ND.T > TAU, 1.0, APART)
    degrees = np.diag(joined.sum(1))
    _, vectors = eigh(degrees - joined, degrees, subset_by_index=[0, 1])
    second = vectors[:, 1]
    part = second > second.mean()
    seed = int(np.abs(second).argmax())
    if not part[seed]:
        part = ~part
    regions, _ = connected(part.reshape(grid))
    mask: np.ndarray = (regions == regions.ravel()[seed]).astype(np.float32)
    return mask
