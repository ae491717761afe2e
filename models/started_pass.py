"""What the heads of a batch have put on a device, and the rows that it becomes on the host."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from models.heads.ranking import best_classes
from models.trunks.transfers import index_tensor

# What a head's `forward` returned for one row of a batch: float32 arrays by name.
Row = Mapping[str, np.ndarray]
# A call's rows of a batch, each with the call's position among those of its row.
Places = Sequence[tuple[int, int]]


class StartedPass:
    """A pass whose heads have been started. On a GPU their outputs may not be computed yet.

    Attributes:
        tensors: the heads' outputs on the device, float32, in no order that matters outside.
    """

    def __init__(self, top_k: Sequence[Sequence[int]]) -> None:
        """
        Args:
            top_k: for each row of the batch, for each of its calls, how many of the best classes a
                ranked one has, or more.
        """
        self.tensors: list[Tensor] = []
        self._results: list[list[Row | Exception]] = [[{}] * len(counts) for counts in top_k]
        # Each call's rows, as (row of the batch, position in it), and its outputs' names.
        self._outputs: list[tuple[Places, Sequence[str]]] = []
        self._top_k = top_k
        # By their number of classes: the logits to rank, with their rows.
        self._unranked: dict[int, list[tuple[Places, Tensor]]] = defaultdict(list)

    def add(self, at: Places, outputs: Mapping[str, Tensor], *, is_ranked: bool = False) -> None:
        """Add outputs for these rows.

        Args:
            is_ranked: their logits are to be ranked.
        """
        tensors = {name: tensor.float() for name, tensor in outputs.items()}
        if any(len(tensor) < len(at) for tensor in tensors.values()):
            raise ValueError(f"a head returned fewer than {len(at)} rows")
        if is_ranked:
            logits_NK = tensors["logits"]
            self._unranked[logits_NK.shape[1]].append((at, logits_NK))
            return
        self.tensors += tensors.values()
        self._outputs.append((at, list(tensors)))

    def top_k(self, places: Iterable[Places]) -> int:
        """How many of the best classes any of these calls has."""
        return max(self._top_k[row][position] for at in places for row, position in at)

    def rank(self) -> None:
        """Replace logits by their best classes: at once for all heads with equally many classes,
        except that few of them need not wait until many are ranked for another row."""
        for classes, parts in self._unranked.items():
            at = [place for places, _ in parts for place in places]
            logits_NK = torch.cat([logits[: len(places)] for places, logits in parts])
            numbers: dict[int, list[int]] = defaultdict(list)
            for number, (row, position) in enumerate(at):
                next_power = 1 << (self._top_k[row][position] - 1).bit_length()
                numbers[min(next_power, classes)].append(number)
            for count, own in numbers.items():
                is_all = len(numbers) == 1
                rows = logits_NK if is_all else logits_NK[index_tensor(own, logits_NK.device)]
                self.add([at[number] for number in own], best_classes(rows, count))
        self._unranked.clear()

    def fail(self, at: Places, error: Exception) -> None:
        """Note that a head has failed for these rows."""
        for row, position in at:
            self._results[row][position] = error

    def errors(self) -> list[Exception]:
        """What heads have raised so far."""
        return [each for row in self._results for each in row if isinstance(each, Exception)]

    def results(self, copies: Sequence[Tensor]) -> list[list[Row | Exception]]:
        """For each row, for each of its calls, the head's arrays, or the exception that it raised.

        Args:
            copies: `tensors` on the host.
        """
        remaining = iter(copies)
        for at, names in self._outputs:
            arrays = {name: next(remaining).numpy() for name in names}
            for number, (row, position) in enumerate(at):
                self._results[row][position] = {name: arrays[name][number] for name in names}
        return self._results
