"""The one CUDA stream on which a device's passes compute, one after another.

Threads that start passes take turns, so a pass is started while the one before it computes, and the
device never waits for the host. Passes on streams of their own would share the device instead: both
would end later, at the same time.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


class ComputeStream:
    """One device's stream. Methods may be called from any thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Held while one thread starts kernels.
        self.lock = threading.RLock()

    @contextmanager
    def use(self) -> Iterator[torch.cuda.Stream]:
        """A context whose kernels are started on the stream, with no other thread's among them."""
        with self.lock, torch.cuda.stream(self._stream):
            yield self._stream


@cache
def compute_stream(device: torch.device) -> ComputeStream:
    """The stream of a device; of `cuda` without a number that of the current device."""
    return ComputeStream(device)
