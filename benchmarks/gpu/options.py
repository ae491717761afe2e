"""What all parts take."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# One measurement or check.
Row = dict[str, Any]
Rows = Iterator[Row]


class UnfinishedError(Exception):
    """A part leaves its rest to another process: its time is up, or the device is lost. It goes on
    where it was when it is called again."""


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
    done: dict[str, Any] = field(default_factory=dict)  # earlier rows, by part
    own: Sequence[Row] = ()  # those of the part itself, if it goes on where it was
    end: float = math.inf  # when a part that can go on later has to stop, in `time.monotonic`

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def judges(self) -> bool:
        """Whether rates are held against what a large GPU should reach."""
        return self.is_gpu and not self.quick

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
