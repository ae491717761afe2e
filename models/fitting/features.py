"""The examples' features from a frozen trunk, cached on disk during a fit."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.heads.linear import Linear, check_has_blocks
from models.heads.ranking import Ranking
from models.started_pass import Row
from models.trunks.base import Trunk
from models.trunks.features import FeatureRequest
from models.trunks.output import TrunkOutput

# The precision of cached keys and values. They are read in every epoch, which takes half the time
# at half precision. The rounding is small compared with the noise of training.
STORED = np.float16


class ReadFeatures(Ranking):
    """A head that returns the features that a head of a kind is trained on.

    For `linear`: `features` (B, F). For `vqt`: `pooled` (B, D) and `keys_values`
    (B, L, 2, h, T, d).
    """

    def __init__(self, trunk: Trunk, kind: str, linear: Linear | None) -> None:
        super().__init__(())
        self.trunk = trunk
        self._linear = linear
        if kind == "vqt":
            check_has_blocks(trunk)
        own = FeatureRequest(keys_values=True)
        self.request = own if linear is None else linear.request

    def forward(self, output: TrunkOutput) -> dict[str, Tensor]:
        if self._linear is not None:
            return {"features": self._linear.features(output)}
        both = [torch.stack(pair, 1) for pair in output.keys_values]
        return {"pooled": self.trunk.pool(output), "keys_values": torch.stack(both, 1)}


Compute = Callable[[Sequence[int]], list[Row]]


@dataclass(slots=True)
class Features:
    """Rows of features by position.

    The first rows, as many as `limit_bytes` holds, are computed once and cached on disk. The others
    are computed again at every read.

    Args:
        compute: the rows of some positions.
        count: the number of positions.
        folder: where the cache is written.
        limit_bytes: the size of the cache.
    """

    compute: Compute
    count: int
    folder: Path
    limit_bytes: int
    _kept: dict[str, np.memmap] | None = None
    _known: np.ndarray | None = None

    def fill(self, order: Iterable[Sequence[int]], done: Callable[[int], None]) -> None:
        """Compute all rows that fit into the cache.

        Args:
            order: batches of positions.
            done: called with the size of each batch.
        """
        for positions in order:
            cached = [p for p in positions if self._known is None or p < len(self._known)]
            if cached:
                self.rows(cached)
            done(len(positions))

    def rows(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Tensors (len(positions), ...) by name; float32, keys and values float16."""
        missing = [p for p in positions if not self._has(p)]
        rows = map(_as_stored, self.compute(missing) if missing else [])
        computed = dict(zip(missing, rows, strict=True))
        for position, row in computed.items():
            self._keep(position, row)
        names = next(iter(computed.values())) if self._kept is None else self._kept
        return {
            name: torch.from_numpy(
                np.stack([computed[p][name] if p in computed else self._at(name, p)
                          for p in positions])
            )
            for name in names
        }  # fmt: skip

    def _has(self, position: int) -> bool:
        known = self._known
        return known is not None and position < len(known) and bool(known[position])

    def _at(self, name: str, position: int) -> np.ndarray:
        assert self._kept is not None
        return np.asarray(self._kept[name][position])

    def _keep(self, position: int, row: Row) -> None:
        if self._kept is None:
            each = sum(array.nbytes for array in row.values())
            capacity = min(self.count, self.limit_bytes // each)
            self._known = np.zeros(capacity, bool)
            self._kept = {
                name: np.memmap(
                    self.folder / f"{name}.bin",
                    dtype=array.dtype,
                    mode="w+",
                    shape=(max(1, capacity), *array.shape),
                )
                for name, array in row.items()
            }
        assert self._known is not None
        if position < len(self._known):
            for name, array in row.items():
                self._kept[name][position] = array
            self._known[position] = True


def _as_stored(row: Row) -> Row:
    """A row with keys and values in the dtype that they are stored in."""
    return {k: v.astype(STORED) if k == "keys_values" else v for k, v in row.items()}
