"""Visual Query Tuning's query tokens (arXiv 2212.03220) beside the blocks of a frozen ViT.

In every block a head's query tokens attend to the image tokens' keys and values, then pass through
layer scale, MLP and residuals like any token, without the final norm. No token attends to them, so
the trunk's own output does not change. Each block has query tokens of its own.

All heads' query tokens lie in one bank per trunk. A batch names those of each row by
integer slots, so that a new head changes tensors' contents and not the computation.

Shape suffixes: B rows, L blocks, C capacity, N query tokens of a batch, S of a row, T of a head,
K image tokens, D embedding, h attention heads, d channels per head.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.trunks.attention import attend, finish_block, keys_values, project
from models.trunks.slot_bank import SlotBank, Slots
from models.trunks.transfers import index_tensor


class QuerySet:
    """A head's query tokens in a trunk's bank, compared by identity.

    Attributes:
        slots: the T consecutive places in the bank.
        nbytes: bytes of the tokens on the device.
    """

    def __init__(self, held: Slots) -> None:
        self._held = held
        self.slots = held.places
        self.nbytes = held.nbytes


class QueryBank(SlotBank):
    """The query tokens of all heads on one trunk: raw (L, C, D), and projected to what each block's
    attention takes (L, C, h, d)."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        super().__init__(dimension=1)
        self._blocks = blocks

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, raw_LTD: Tensor) -> QuerySet:
        """Store query tokens (L, T, D) until the returned set is garbage-collected."""
        projected = [project(block, raw) for block, raw in zip(self._blocks, raw_LTD, strict=True)]
        return QuerySet(self.store(raw_LTD, torch.stack(projected)))


class QueryBatch:
    """The query tokens of each row of a batch: what a pass takes, and how its output is split by
    head again.

    Rows with equally many tokens form a group and share one attention call.
    """

    def __init__(
        self,
        requests: Sequence[tuple[QuerySet, Sequence[int]]],
        size: int,
        device: torch.device,
        *,
        max_padded: int = 0,
    ) -> None:
        """
        Args:
            requests: query sets, each with the rows that request it.
            size: rows of the batch.
            max_padded: pad all rows to equally many tokens if the longest has at most so many.
        """
        self._requests = requests
        self._device = device
        slots_of = self._lay_out(size)
        most = max(map(len, slots_of.values()), default=0)
        if most <= max_padded:
            slots_of = {
                row: slots_of.get(row, []) + [0] * (most - len(slots_of.get(row, [])))
                for row in range(size)
            }
        rows_by_count: dict[int, list[int]] = defaultdict(list)
        for row in sorted(slots_of):
            rows_by_count[len(slots_of[row])].append(row)
        self.groups: list[tuple[list[int], list[list[int]]]] = [
            (rows, [slots_of[row] for row in rows]) for rows in rows_by_count.values()
        ]
        self.whole = tuple(rows == list(range(size)) for rows, _ in self.groups)
        starts: dict[int, int] = {}
        place = 0
        for rows, slots in self.groups:
            for row in rows:
                starts[row] = place
                place += len(slots[0])
        self._starts = starts

    def _lay_out(self, size: int) -> dict[int, list[int]]:
        """The slots of each row that has any; `self._offsets` is where a set begins in a row."""
        slots_of: dict[int, list[int]] = defaultdict(list)
        self._offsets: dict[tuple[QuerySet, int], int] = {}
        for queries, rows in self._requests:
            for row in dict.fromkeys(rows):
                self._offsets[queries, row] = len(slots_of[row])
                slots_of[row] += queries.slots
        return slots_of

    @torch.inference_mode(False)  # compiled programs are for inputs of one kind
    def inputs(self, bank: QueryBank) -> tuple[Tensor, ...]:
        """The bank's tensors, then for each group its rows (R,), unless it is the whole batch, and
        its slots (R, S), both int64."""
        tensors = list(bank.for_pass())
        for (rows, slots), whole in zip(self.groups, self.whole, strict=True):
            tensors += [] if whole else [self._indices(rows)]
            tensors.append(self._indices(slots))
        return tuple(tensors)

    def split(self, outputs_LND: Tensor) -> "QueryOutputs":
        """A pass's outputs of the query tokens, by set."""
        firsts = {
            queries: [self._starts[row] + self._offsets[queries, row] for row in rows]
            for queries, rows in self._requests
        }
        return QueryOutputs(firsts, outputs_LND)

    def _indices(self, values: Any) -> Tensor:
        return index_tensor(values, self._device)


class QueryOutputs(Mapping[QuerySet, Tensor]):
    """The outputs of a batch's query tokens: for each set (R, L, T, D), for its R rows in the order
    in which they were requested."""

    def __init__(
        self,
        firsts: Mapping[QuerySet, Sequence[int]] | None = None,
        outputs_LND: Tensor | None = None,
    ) -> None:
        """
        Args:
            firsts: for each set the place of its first token in each row.
            outputs_LND: of all tokens.
        """
        self._firsts = firsts or {}
        self._outputs_LND = outputs_LND

    def __getitem__(self, queries: QuerySet) -> Tensor:
        return self.joined([queries])

    def __iter__(self) -> Iterator[QuerySet]:
        return iter(self._firsts)

    def __len__(self) -> int:
        return len(self._firsts)

    def joined(self, sets: Sequence[QuerySet]) -> Tensor:
        """The rows of sets of equally many tokens, one set after another."""
        assert self._outputs_LND is not None
        count = len(sets[0].slots)
        firsts = [first for queries in sets for first in self._firsts[queries]]
        places = [first + t for first in firsts for t in range(count)]
        chosen_LND = self._outputs_LND[:, index_tensor(places, self._outputs_LND.device)]
        return torch.unflatten(chosen_LND, 1, (len(firsts), count)).transpose(0, 1)


class QueryPass:
    """The query tokens of one pass, taken through one block after another.

    All groups' tokens share everything but the attention.
    """

    def __init__(
        self, blocks: Sequence[Any], whole: Sequence[bool], inputs: Sequence[Tensor]
    ) -> None:
        """
        Args:
            whole: `QueryBatch.whole`.
            inputs: `QueryBatch.inputs`.
        """
        self._blocks = blocks
        self._raw_LCD, self._projected_LChd, *groups = inputs
        self._groups: list[tuple[Tensor | None, Tensor]] = []
        for is_whole in whole:
            rows = None if is_whole else groups.pop(0)
            self._groups.append((rows, groups.pop(0)))
        self._slots_N = torch.cat([slots.flatten() for _, slots in self._groups])
        self._outputs: list[Tensor] = []

    def at_block(self, number: int, qkv_BKE: Tensor) -> None:
        """Take the query tokens of a block through it, given what its `qkv` layer returned."""
        block = self._blocks[number]
        keys, values = keys_values(block, qkv_BKE)
        context = []
        for rows, slots_RS in self._groups:
            projected_RShd = self._projected_LChd[number][slots_RS]
            own = (keys, values) if rows is None else (keys[rows], values[rows])
            context.append(attend(projected_RShd, *own).flatten(0, 1))
        raw_ND = self._raw_LCD[number][self._slots_N]
        self._outputs.append(finish_block(block, raw_ND, torch.cat(context)))

    def output(self) -> Tensor:
        """(L, N, D): every block's query outputs."""
        return torch.stack(self._outputs)
