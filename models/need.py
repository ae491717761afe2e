"""What heads want of a trunk's pass beyond its last output. Nothing else is computed or kept."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Queries:
    """A head's query tokens (L, T, D), a set for each block, and what of them does not depend on
    the image (see `models/queries.py`). Compared by identity, since its tensors never change."""

    def __init__(self, raw_LTD: Tensor, projected_LThd: Tensor) -> None:
        self.raw_LTD = raw_LTD
        self.projected_LThd = projected_LThd

    @property
    def count(self) -> int:
        """T, queries a block."""
        return self.raw_LTD.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.raw_LTD.nbytes + self.projected_LThd.nbytes


@dataclass(frozen=True, slots=True)
class Ride:
    """Queries, and the rows of the batch that want them."""

    queries: Queries
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Need:
    """`layers` and `attention` name blocks by index: their outputs, and their attention
    probabilities. `keys_values` of all blocks. `rides` are queries to be computed along."""

    layers: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    keys_values: bool = False
    rides: tuple[Ride, ...] = ()

    def __or__(self, other: "Need") -> "Need":
        return Need(
            self.layers | other.layers,
            self.attention | other.attention,
            self.keys_values or other.keys_values,
            self.rides + other.rides,
        )


NOTHING = Need()


class Needy(Protocol):
    """The part of a head that says what it wants."""

    @property
    def need(self) -> Need:
        """What it wants of every pass, but for its queries."""

    @property
    def queries(self) -> Queries | None:
        """Its queries, if it has any."""


def need_of(wanted: Iterable[tuple[Needy, Sequence[int]]]) -> Need:
    """What a batch needs, from its heads and the rows that each of them answers for."""
    together = NOTHING
    rides = []
    for head, rows in wanted:
        if head.need is not NOTHING:
            together |= head.need
        if head.queries is not None:
            rides.append(Ride(head.queries, tuple(rows)))
    return together | Need(rides=tuple(rides)) if rides else together
