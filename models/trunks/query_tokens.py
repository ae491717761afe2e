"""Visual Query Tuning's query path (arXiv 2212.03220) beside the blocks of a frozen ViT.

A block's queries go through it as its own tokens do, but read the keys and values of those and
are read by nobody: attention, layer scale, MLP and residuals, with no norm afterwards. Every block
has queries of its own. Only their attention depends on the image.

Shape suffixes: B rows, L blocks, N query tokens of a whole batch, T of one head, K image tokens,
D embedding, h attention heads, d channels of one.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from models.trunks.features import Queries, Ride


def prepare_queries(blocks: Sequence[Any], raw_LTD: Tensor) -> Queries:
    """Query tokens with all that can be computed before an image comes."""
    with torch.no_grad():
        projected = [project(block, raw) for block, raw in zip(blocks, raw_LTD, strict=True)]
    return Queries(raw_LTD, torch.stack(projected))


def project(block: Any, raw_TD: Tensor) -> Tensor:
    """(T, h, d): what the block's attention asks with for these tokens."""
    attention = block.attn
    bias = attention.qkv.bias
    size = attention.num_heads * attention.head_dim
    asked = linear(
        block.norm1(raw_TD), attention.qkv.weight[:size], None if bias is None else bias[:size]
    )
    projected: Tensor = attention.q_norm(torch.unflatten(asked, -1, (attention.num_heads, -1)))
    return projected


def keys_values(block: Any, qkv_BKE: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, (B, h, K, d) each, from what the block's `qkv` layer gave."""
    attention = block.attn
    split = torch.unflatten(qkv_BKE, -1, (3, attention.num_heads, attention.head_dim))
    _, keys, values = split.permute(2, 0, 3, 1, 4).unbind(0)
    return attention.k_norm(keys), values


def attention_map(block: Any, qkv_BKE: Tensor, first: int | None = None) -> Tensor:
    """(B, h, K, K) probabilities with which the block's tokens read one another; or (B, h, first,
    K), how the first ones do."""
    attention = block.attn
    split = torch.unflatten(qkv_BKE, -1, (3, attention.num_heads, attention.head_dim))
    queries, keys, _ = split.permute(2, 0, 3, 1, 4).unbind(0)
    queries = attention.q_norm(queries[:, :, :first]) * attention.scale
    keys = attention.k_norm(keys)
    probabilities: Tensor = (queries @ keys.transpose(-2, -1)).softmax(-1)
    return probabilities


def read(projected_BThd: Tensor, keys_BhKd: Tensor, values_BhKd: Tensor) -> Tensor:
    """(B, T, h * d): what queries gather from image tokens, each row from its own."""
    found = scaled_dot_product_attention(projected_BThd.transpose(1, 2), keys_BhKd, values_BhKd)
    return found.transpose(1, 2).flatten(2)


def finish_block(block: Any, raw: Tensor, found: Tensor) -> Tensor:
    """The rest of the block for tokens (..., D) that have read `found` (..., h * d)."""
    attention = block.attn
    x = raw + block.ls1(attention.proj(attention.norm(found)))
    finished: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return finished


class Riding:
    """The queries of all heads of one pass, computed together, a block at a time.

    The batch's query tokens lie row by row; rows with equally many share an attention, and all
    tokens share the rest of the block.
    """

    def __init__(self, blocks: Sequence[Any], rides: Sequence[Ride]) -> None:
        self._blocks = blocks
        self._rides = rides
        self._raw_LUD = torch.cat([ride.queries.raw_LTD for ride in rides], 1)
        self._projected_LUhd = torch.cat([ride.queries.projected_LThd for ride in rides], 1)
        self._device = self._raw_LUD.device
        counts = [ride.queries.count for ride in rides]
        starts = [sum(counts[:number]) for number in range(len(rides))]
        rides_of: dict[int, list[int]] = defaultdict(list)
        for number, ride in enumerate(rides):
            for row in dict.fromkeys(ride.rows):
                rides_of[row].append(number)
        rows_by_count: dict[int, list[int]] = defaultdict(list)
        for row in sorted(rides_of):
            rows_by_count[sum(counts[number] for number in rides_of[row])].append(row)
        self._groups = [(rows, self._tensor(rows), n) for n, rows in rows_by_count.items()]
        self._slots: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        for row in (row for rows, _, _ in self._groups for row in rows):
            for number in rides_of[row]:
                self._slots[number, row] = len(tokens)
                tokens += range(starts[number], starts[number] + counts[number])
        self._tokens_N = self._tensor(tokens)
        self._outputs: list[Tensor] = []

    def at_block(self, number: int, qkv_BKE: Tensor) -> None:
        """Take the queries of a block through it."""
        block = self._blocks[number]
        keys, values = keys_values(block, qkv_BKE)
        asked_Nhd = self._projected_LUhd[number][self._tokens_N]
        found = []
        for rows, index, count in self._groups:
            here, asked_Nhd = asked_Nhd.tensor_split([len(rows) * count])
            whole = rows == list(range(len(keys)))
            theirs = (keys, values) if whole else (keys[index], values[index])
            found.append(read(torch.unflatten(here, 0, (len(rows), count)), *theirs).flatten(0, 1))
        raw_ND = self._raw_LUD[number][self._tokens_N]
        self._outputs.append(finish_block(block, raw_ND, torch.cat(found)))

    def outputs(self) -> dict[Queries, Tensor]:
        """(rows, L, T, D) for each head's queries, in the order of its ride's rows."""
        together_LND = torch.stack(self._outputs)
        outputs = {}
        for number, ride in enumerate(self._rides):
            count = ride.queries.count
            slots = [self._slots[number, row] + t for row in ride.rows for t in range(count)]
            picked = together_LND[:, self._tensor(slots)]
            by_row = torch.unflatten(picked, 1, (len(ride.rows), count))
            outputs[ride.queries] = by_row.transpose(0, 1)
        return outputs

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)
