"""Visual Query Tuning (arXiv 2212.03220): query tokens read every block of a frozen ViT.

The features are the trunk's pooled output and each block's query outputs, each of these segments of
unit length; then a classifier, on a selection of them where training has selected some.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from models.checkpoints.checkpoint import HeadState
from models.errors import CheckpointError
from models.heads.linear import Linear, check_has_blocks, first_size
from models.trunks.base import TrunkOutput
from models.trunks.features import Need, Ride
from models.trunks.query_tokens import prepare_queries

MAX_QUERIES = 256  # a block; a pass costs as much as there are


class Vqt(Linear):
    """Settings: `normalize` (true): whether segments have unit length.

    Tensors: `queries` (L, T, D); maybe `combine` (L, T), the weights that sum a block's queries to
    one; maybe `indices` (F,) of the features selected; `classifier.N...`.
    """

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
                f"the queries have shape {shape}; the trunk wants ({depth}, T, {dim}), T up to "
                f"{MAX_QUERIES}"
            )
        self.combine_LT: Tensor | None = None
        if "combine" in state.tensors:
            self.combine_LT = _of_shape("combine", state, 2).float().to(placement.device)
            if self.combine_LT.shape != raw_LTD.shape[:2]:
                raise CheckpointError("the head's combine does not fit its queries")
        tokens = 1 if self.combine_LT is not None else raw_LTD.shape[1]
        self.indices = selection(state, dim * (1 + depth * tokens), self._wanted())
        if self.indices is not None:
            self.indices = self.indices.to(placement.device)
        self.queries = prepare_queries(self.trunk.blocks, raw_LTD)

    def _wanted(self) -> int:
        assert self.network is not None
        return first_size(self.network)

    def needs(self, rows: Sequence[int]) -> Need:
        return Need(rides=(Ride(self.queries, tuple(rows)),))

    def features(self, output: TrunkOutput) -> Tensor:
        """(B, F) float32: what the classifier sees."""
        features = vqt_features(
            self.trunk.pool(output), output.queries[self.queries], self.combine_LT, self.normalize
        )
        return features if self.indices is None else features[:, self.indices]


def vqt_features(
    pooled_BD: Tensor, outputs_BLTD: Tensor, combine_LT: Tensor | None, unit: bool
) -> Tensor:
    """(B, D * (1 + L * T)), or with weights to combine by (B, D * (1 + L)): the pooled features,
    then those of block 0, of block 1, and so on."""
    pooled_BD, outputs_BLTD = pooled_BD.float(), outputs_BLTD.float()
    if combine_LT is None:
        segments_BLF = outputs_BLTD.flatten(2)
    else:
        segments_BLF = torch.einsum("bltd,lt->bld", outputs_BLTD, combine_LT)
    if unit:
        pooled_BD, segments_BLF = normalize(pooled_BD, dim=-1), normalize(segments_BLF, dim=-1)
    return torch.cat([pooled_BD, segments_BLF.flatten(1)], -1)


def selection(state: HeadState, available: int, wanted: int) -> Tensor | None:
    """The indices of the features that the classifier takes; None where it takes all.

    Raises:
        CheckpointError: it takes fewer, and nothing says which.
    """
    indices = state.tensors.get("indices")
    if indices is None:
        if wanted != available:
            raise CheckpointError(
                f"the head's classifier takes {wanted} features of {available}; which ones, only "
                "indices can tell"
            )
        return None
    if indices.shape != (wanted,) or indices.dtype != torch.int64:
        raise CheckpointError(f"indices must be {wanted} whole numbers (int64)")
    if wanted and not (int(indices.min()) >= 0 and int(indices.max()) < available):
        raise CheckpointError(f"indices must lie in 0..{available - 1}")
    return indices


def _of_shape(name: str, state: HeadState, dimensions: int) -> Tensor:
    tensor = state.tensors.get(name)
    if tensor is None or tensor.dim() != dimensions:
        raise CheckpointError(f"the head has no {name} of {dimensions} dimensions")
    return tensor
