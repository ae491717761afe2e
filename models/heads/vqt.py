"""Visual Query Tuning (arXiv 2212.03220): query tokens read every block of a frozen ViT.

The features are the trunk's pooled output and each block's query outputs, each segment of unit
length. A classifier follows, on all features or on those that training has selected.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.checkpoints.checkpoint import HeadState
from models.errors import CheckpointError
from models.heads.linear import Linear, check_has_blocks, first_size
from models.trunks.features import FeatureRequest
from models.trunks.output import TrunkOutput

MAX_QUERIES = 256  # per block; each one costs a token in every pass


class Vqt(Linear):
    """Settings: `normalize` (true): scale segments to unit length.

    Tensors: `queries` (L, T, D); optionally `combine` (L, T), weights that sum a block's queries to
    one; optionally `indices` (F,), the selected features; `classifier.N...`.
    """

    kind = "vqt"

    def read_settings(self, state: HeadState) -> None:
        check_has_blocks(self.trunk)
        placement = self.trunk.placement
        self.normalize = bool(state.settings.get("normalize", True))
        raw_LTD = _of_shape("queries", state, 3).to(placement.device, placement.dtype)
        depth, dim = len(self.trunk.blocks), self.trunk.blocks[0].attn.qkv.in_features
        fits = raw_LTD.shape[0] == depth and raw_LTD.shape[2] == dim
        if not fits or not 1 <= raw_LTD.shape[1] <= MAX_QUERIES:
            shape = tuple(raw_LTD.shape)
            raise CheckpointError(
                f"the queries have shape {shape}; the trunk takes ({depth}, T, {dim}), T up to "
                f"{MAX_QUERIES}"
            )
        self.combine_LT: Tensor | None = None
        if "combine" in state.tensors:
            self.combine_LT = _of_shape("combine", state, 2).float().to(placement.device)
            if self.combine_LT.shape != raw_LTD.shape[:2]:
                raise CheckpointError("the head's combine must have shape (L, T) of its queries")
        tokens = 1 if self.combine_LT is not None else raw_LTD.shape[1]
        self.indices = selection(state, dim * (1 + depth * tokens), first_size(self.network))
        if self.indices is not None:
            self.indices = self.indices.to(placement.device)
        self.queries = self.trunk.add_queries(raw_LTD)
        self.request = FeatureRequest(queries=self.queries)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.queries.nbytes

    def features(self, output: TrunkOutput) -> Tensor:
        """(B, F) float32: the classifier's input."""
        features = vqt_features(
            self.trunk.pool(output), output.queries[self.queries], self.combine_LT, self.normalize
        )
        return features if self.indices is None else features[:, self.indices]


def vqt_features(
    pooled_BD: Tensor, outputs_BLTD: Tensor, combine_LT: Tensor | None, unit: bool
) -> Tensor:
    """The pooled features, then the query outputs of block 0, of block 1, and so on:
    (B, D * (1 + L * T)), or (B, D * (1 + L)) if they are combined. `unit` scales each segment to
    unit length."""
    pooled_BD, outputs_BLTD = pooled_BD.float(), outputs_BLTD.float()
    if combine_LT is None:
        segments_BLF = outputs_BLTD.flatten(2)
    else:
        segments_BLF = torch.einsum("bltd,lt->bld", outputs_BLTD, combine_LT)
    if unit:
        pooled_BD, segments_BLF = normalize(pooled_BD, dim=-1), normalize(segments_BLF, dim=-1)
    return torch.cat([pooled_BD, segments_BLF.flatten(1)], -1)


def selection(state: HeadState, available: int, taken: int) -> Tensor | None:
    """The indices of the features that the classifier takes; None if it takes all.

    Raises:
        CheckpointError: it takes fewer, and there are no indices; or they are out of range.
    """
    indices = state.tensors.get("indices")
    if indices is None:
        if taken != available:
            raise CheckpointError(
                f"the head's classifier takes {taken} features of {available}; the "
                "tensor indices must say which"
            )
        return None
    if indices.shape != (taken,) or indices.dtype != torch.int64:
        raise CheckpointError(f"indices must be {taken} integers (int64)")
    if taken and not (int(indices.min()) >= 0 and int(indices.max()) < available):
        raise CheckpointError(f"indices must lie in 0..{available - 1}")
    return indices


def _of_shape(name: str, state: HeadState, dimensions: int) -> Tensor:
    tensor = state.tensors.get(name)
    if tensor is None or tensor.dim() != dimensions:
        raise CheckpointError(f"the head needs a tensor {name} of {dimensions} dimensions")
    return tensor
