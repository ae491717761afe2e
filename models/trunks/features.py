"""What heads want of a trunk's pass beyond its last output. Nothing else is computed or kept."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


class Queries:
    """A head's query tokens (L, T, D), a set for each block, and what of them does not depend on
    the image (see `models/trunks/query_tokens.py`). Compared by identity, since its tensors never change."""

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
    """`layers`, `attention` and `looks` name blocks by index: their outputs, their attention
    probabilities, and of these the first token's alone. `keys_values` are rows whose keys and
    values of all blocks are wanted. `rides` are queries to be computed along. `pixels` are the
    normalised input, and `dense` what a CLIP embeds of each patch. Where nobody wants `features`,
    the pass itself is left out."""

    layers: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    looks: frozenset[int] = frozenset()
    keys_values: tuple[int, ...] = ()
    rides: tuple[Ride, ...] = ()
    pixels: bool = False
    dense: bool = False
    features: bool = True


NOTHING = Need()


def together(needs: Iterable[Need]) -> Need:
    """What heads of one batch need between them."""
    every = list(needs)
    wanted = [need for need in every if need is not NOTHING]
    if not wanted:
        return NOTHING
    return Need(
        layers=frozenset(number for need in wanted for number in need.layers),
        attention=frozenset(number for need in wanted for number in need.attention),
        looks=frozenset(number for need in wanted for number in need.looks),
        keys_values=tuple(sorted({row for need in wanted for row in need.keys_values})),
        rides=tuple(ride for need in wanted for ride in need.rides),
        pixels=any(need.pixels for need in wanted),
        dense=any(need.dense for need in wanted),
        features=any(need.features for need in every),
    )
