"""Visual Query Tuning (arXiv 2212.03220): query tokens read every block of a frozen ViT.

The features are the trunk's pooled output and each block's query outputs, each segment of unit
length. A classifier follows, on all features or on those that training has selected.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Self

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.checkpoints.checkpoint import HeadState
from models.checkpoints.strict import load_strictly
from models.errors import CheckpointError
from models.heads.linear import Linear, check_has_blocks
from models.heads.stacked import Part, classify_together
from models.trunks.features import FeatureRequest
from models.trunks.output import TrunkOutput
from models.trunks.transfers import index_tensor
from models.trunks.weights import parameter_bytes

ATTENDING = "attend."
MAX_QUERIES = 256  # per block; each one costs a token in every pass


class Vqt(Linear):
    """Settings: `normalize` (true): scale segments to unit length.

    Tensors: `queries` (L, T, D); optionally `combine` (L, T), weights that sum a block's queries to
    one; optionally `attend.`, a ViT's block that combines the features instead, with the setting
    `attending_heads`, optionally after `mlps.L.`, an MLP for each block's queries, and `positions`
    (1, 1 + L, D); optionally `indices` (F,), the selected features; `classifier.N...`.
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
        self.attend = attending_block(state, dim, depth)
        if self.attend is not None:
            self.attend.to(placement.device)
        count = dim if self.attend is not None else dim * (1 + depth * tokens)
        self.indices = selection(state, count, self.feature_count)
        if self.indices is not None:
            self.indices = self.indices.to(placement.device)
        self.queries = self.trunk.add_queries(raw_LTD)
        self.request = FeatureRequest(queries=self.queries)

    def check_width(self) -> None:
        """Nothing is left to check: `selection` has done it."""

    @property
    def nbytes(self) -> int:
        attending = 0 if self.attend is None else parameter_bytes(self.attend)
        return super().nbytes + self.queries.nbytes + attending

    def features(self, output: TrunkOutput) -> Tensor:
        """(B, F) float32: the classifier's input."""
        pooled, queries = self.trunk.pool(output), output.queries[self.queries]
        if self.attend is not None:
            combined: Tensor = self.attend(pooled, queries)
            return combined
        return self._selected(vqt_features(pooled, queries, self.combine_LT, self.normalize))

    def _selected(self, features: Tensor) -> Tensor:
        return features if self.indices is None else features[:, self.indices]

    @property
    def shared(self) -> Hashable:
        if self.attend is not None or self.combine_LT is not None:
            return None
        return type(self), len(self.queries.slots), self.normalize

    @classmethod
    def forward_together(
        cls, heads: Sequence[Self], output: TrunkOutput, index: Sequence[Sequence[int]], best: int
    ) -> list[Part]:
        """One computation of the features, then the heads' classifiers."""
        queries = output.queries.joined([head.queries for head in heads])
        rows = index_tensor([row for rows in index for row in rows], queries.device)
        trunk = heads[0].trunk
        features = vqt_features(trunk.pool(output)[rows], queries, None, heads[0].normalize)
        parts = features.split_with_sizes([len(rows) for rows in index])
        selected = _select_together([head.indices for head in heads], parts)
        return classify_together(trunk, [head.network for head in heads], selected, best)


def _select_together(indices: Sequence[Tensor | None], parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The selected features (R, F) of each head's rows: at once for all heads that select equally
    many."""
    selected = list(parts)
    by_count: dict[int, list[int]] = defaultdict(list)
    for number, own in enumerate(indices):
        if own is not None:
            by_count[len(own)].append(number)
    for numbers in by_count.values():
        lengths = [len(parts[number]) for number in numbers]
        owners = [place for place, length in enumerate(lengths) for _ in range(length)]
        indices_HF = torch.stack([own for n in numbers if (own := indices[n]) is not None])
        rows = torch.cat([parts[number] for number in numbers])
        chosen = rows.gather(1, indices_HF[index_tensor(owners, rows.device)])
        for number, own in zip(numbers, chosen.split_with_sizes(lengths), strict=True):
            selected[number] = own
    return selected


class Attending(nn.Module):
    """A ViT's block attends to all features as tokens of unit length; the first one is its output.

    Args:
        mlps: one for each of the trunk's blocks, which its queries pass before; may be empty.
        positions_KD: added to the pooled token and to the queries of each block, (1 + L, D), or 0.
    """

    def __init__(self, block: nn.Module, mlps: Sequence[nn.Module], positions_KD: Tensor) -> None:
        super().__init__()
        self.block = block
        self.mlps = nn.ModuleList(mlps)
        self.positions_KD: Tensor
        self.register_buffer("positions_KD", positions_KD)

    def forward(self, pooled_BD: Tensor, queries_BLTD: Tensor) -> Tensor:
        """(B, D) float32."""
        first_BD = normalize(pooled_BD.float(), dim=-1) + self.positions_KD[0]
        queries_BLTD = normalize(queries_BLTD.float(), dim=-1)
        if len(self.mlps):
            parts = zip(self.mlps, queries_BLTD.unbind(1), strict=True)
            queries_BLTD = torch.stack([mlp(part_BTD) for mlp, part_BTD in parts], 1)
        queries_BLTD = queries_BLTD + self.positions_KD[1:, None]
        tokens: Tensor = self.block(torch.cat([first_BD[:, None], queries_BLTD.flatten(1, 2)], 1))
        return tokens[:, 0]


def attending_block(state: HeadState, dim: int, depth: int) -> nn.Module | None:
    """The block of tensors `attend.`, with what comes before it; None if there are none of these.

    Raises:
        CheckpointError: its tensors do not fit.
    """
    tensors = _below(ATTENDING, state)
    if not tensors:
        return None
    if "mlp.fc1.weight" not in tensors:
        raise CheckpointError("the head's attend has no mlp.fc1.weight")
    block: nn.Module = Block(
        dim,
        int(state.settings.get("attending_heads", max(1, dim // 64))),
        mlp_ratio=(tensors["mlp.fc1.weight"].shape[0] + 0.5) / dim,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    load_strictly(block, tensors, "the head's attend")
    mlps: list[nn.Module] = []
    positions_KD = torch.zeros(1 + depth, dim)
    if "positions" in state.tensors:
        positions_1KD = _of_shape("positions", state, 3).float()
        if positions_1KD.shape != (1, 1 + depth, dim):
            raise CheckpointError("the head's positions must have shape (1, 1 + L, D)")
        positions_KD = positions_1KD[0]
        for layer in range(depth):
            weights = _below(f"mlps.{layer}.", state)
            bias = weights.get("fc1.bias")
            mlps.append(Mlp(dim, dim if bias is None else bias.numel()))
            load_strictly(mlps[-1], weights, f"the head's mlps.{layer}")
    return Attending(block, mlps, positions_KD).eval().requires_grad_(False)


def _below(prefix: str, state: HeadState) -> dict[str, Tensor]:
    """The head's tensors below a prefix, in float32."""
    return {
        key.removeprefix(prefix): value.float()
        for key, value in state.tensors.items()
        if key.startswith(prefix)
    }


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
                "tensor indices must say which, unless each block's queries are averaged "
                "(pooling_feats)"
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
