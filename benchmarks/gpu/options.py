"""What all parts take."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# One measurement or check.
Row = dict[str, Any]
Rows = Iterator[Row]


@dataclass(frozen=True, slots=True)
class Options:
    """What all parts take.

    Args:
        folder: where the bundle and the networks' files are.
        seconds: of one measurement.
        batches: batch sizes of the forward-only ceiling.
        clients: requests in flight.
        quick: tiny networks and few rounds, to try the benchmark itself.
    """

    folder: Path
    device: torch.device
    networks: tuple[str, ...]
    engines: tuple[str, ...]
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    clients: int
    seconds: float
    quick: bool
    shared: Path
    done: dict[str, Any] = field(default_factory=dict)  # earlier parts' rows, by part

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        """What is served: the first of the precisions."""
        return self.precisions[0]

    def combinations(self) -> Iterator[tuple[str, str, str]]:
        """Each network with each precision and engine."""
        return itertools.product(self.networks, self.precisions, self.engines)

    def wait(self) -> None:
        """Wait until the device has done what was started."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)
