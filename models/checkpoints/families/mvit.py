"""Blocks of MViTs, by the names of SlowFast's configurations (the table `MVIT`)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from models.checkpoints.families.known import whole

REVERSIBLE = "rev_backbone.layers."


def is_planar(mvit: Mapping[str, Any]) -> bool:
    """Whether sizes have two numbers, as the repository for images alone writes them."""
    if stated := mvit.get("POOL_KVQ_KERNEL") or mvit.get("POOL_KV_STRIDE_ADAPTIVE"):
        return len(stated) == 2
    strides = [*(mvit.get("POOL_Q_STRIDE") or ()), *(mvit.get("POOL_KV_STRIDE") or ())]
    return bool(strides) and all(len(stride) == 3 for stride in strides)


def plain_blocks(mvit: Mapping[str, Any], widen_in_attention: bool) -> list[dict[str, Any]]:
    """Arguments of each `Block`."""
    depth = whole("MVIT.DEPTH", mvit.get("DEPTH", 16))
    dims, heads = (_multipliers(mvit.get(key), depth) for key in ("DIM_MUL", "HEAD_MUL"))
    stem = dim = whole("MVIT.EMBED_DIM", mvit.get("EMBED_DIM", 96))
    count = whole("MVIT.NUM_HEADS", mvit.get("NUM_HEADS", 1))
    blocks = []
    for number, pool in enumerate(_pools(mvit, depth)):
        count = _rounded(count, heads[number], 1)
        ahead = number if widen_in_attention else number + 1
        width = _rounded(dim, dims[ahead], _rounded(count, heads[ahead], 1))
        sizes = {"dim": dim, "dim_out": width, "num_heads": count, "stem_dim": stem}
        blocks.append({**sizes, **pool})
        dim = width
    return blocks


def reversible_blocks(
    mvit: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Arguments of each `ReversibleLayer`. Widths are those of the weights."""
    depth = whole("MVIT.DEPTH", mvit.get("DEPTH", 16))
    heads = _multipliers(mvit.get("HEAD_MUL"), depth)
    stem, count = (
        whole("MVIT.EMBED_DIM", mvit.get("EMBED_DIM", 96)),
        whole("MVIT.NUM_HEADS", mvit.get("NUM_HEADS", 1)),
    )
    rev = mvit.get("REV", {})
    buffered = {int(number) for number in rev.get("BUFFER_LAYERS") or ()}
    blocks = []
    for number, pool in enumerate(_pools(mvit, depth)):
        count = _rounded(count, heads[number], 1)
        sizes = {
            "dim": tensors[f"{REVERSIBLE}{number}.F.norm.weight"].shape[0],
            "dim_out": tensors[f"{REVERSIBLE}{number}.F.attn.proj.weight"].shape[0],
            "num_heads": count,
            "stem_dim": stem,
            "fusion": rev.get("PRE_Q_FUSION", "avg") if number in buffered else None,
        }
        blocks.append({**sizes, **pool})
    return blocks


def _multipliers(pairs: Any, depth: int) -> list[float]:
    """A factor per block, from pairs of block and factor; 1 for the others."""
    factors = [1.0] * (depth + 1)
    for block, factor in pairs or ():
        factors[int(block)] = float(factor)
    return factors


def _rounded(width: int, factor: float, divisor: int) -> int:
    """Upstream's width times a factor, as a multiple of `divisor`."""
    scaled = width * factor
    result = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return int(result + divisor if result < 0.9 * scaled else result)


def _three(sizes: Sequence[int]) -> list[int]:
    """Sizes in time, height and width, from those or from height and width alone."""
    plain = [int(size) for size in sizes]
    return [1, *plain] if len(plain) == 2 else plain


def _pools(mvit: Mapping[str, Any], depth: int) -> list[dict[str, list[int]]]:
    """Kernels and strides of each block."""
    strides_q = {int(s[0]): _three(s[1:]) for s in mvit.get("POOL_Q_STRIDE") or ()}
    strides_kv = {int(s[0]): _three(s[1:]) for s in mvit.get("POOL_KV_STRIDE") or ()}
    if mvit.get("POOL_KV_STRIDE_ADAPTIVE"):
        current = _three(mvit["POOL_KV_STRIDE_ADAPTIVE"])
        for number in range(depth):
            for axis, stride in enumerate(strides_q.get(number, ())):
                current[axis] = max(current[axis] // stride, 1)
            strides_kv[number] = list(current)
    stated = mvit.get("POOL_KVQ_KERNEL")
    planar = is_planar(mvit)

    def kernel(stride: list[int]) -> list[int]:
        if stated:
            return _three(stated)
        if planar and stride:
            return [1, 3, 3]  # that repository's default
        return [step + 1 if step > 1 else step for step in stride]

    return [
        {
            "kernel_q": kernel(strides_q.get(number, [])) if number in strides_q else [],
            "kernel_kv": kernel(strides_kv.get(number, [])) if number in strides_kv else [],
            "stride_q": strides_q.get(number, []),
            "stride_kv": strides_kv.get(number, []),
        }
        for number in range(depth)
    ]
