"""The one CUDA stream on which a device's passes compute, one after another.

Threads that start passes take turns, so a pass is started while the one before it computes, and the
device never waits for the host. Passes on streams of their own would share the device instead: both
would end later, at the same time.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


class ComputeStream:
    """One device's stream. Methods may be called from any thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Held while one thread starts kernels.
        self.lock = threading.RLock()

    @contextmanager
    def use(self) -> Iterator[torch.cuda.Stream]:
        """A context whose kernels are started on the stream, with no other thread's among them."""
        with self.lock, on_stream(self._stream):
            yield self._stream

    def keep(self, tensor: Tensor) -> None:
        """Leave a tensor's memory alone until what the stream has been given so far has ended, also
        if the tensor is freed before. Its memory belongs to another stream."""
        tensor.record_stream(self._stream)

    def run(
        self, function: Callable[..., Mapping[str, Tensor]], inputs: tuple[Tensor, ...]
    ) -> Mapping[str, Tensor]:
        """Call a function on the stream from any other one: it runs after what that one has been
        given so far, and what that one is given later runs after it."""
        callers = torch.cuda.current_stream(self._stream.device)
        with self.use() as stream:
            if callers == stream:
                return function(*inputs)
            stream.wait_stream(callers)
            try:
                outputs = function(*inputs)
            finally:  # also if it fails: the caller then frees what started kernels may still read
                callers.wait_stream(stream)
        for tensor in outputs.values():
            tensor.record_stream(callers)  # its memory belongs to the other stream
        return outputs


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """A context whose kernels and copies are started on a stream, on its device.

    `torch.cuda.stream` alone would select the thread's former device again at its end. That is the
    first GPU in threads that have selected none, and a CUDA context would be made on it.
    """
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


@cache
def compute_stream(device: torch.device) -> ComputeStream:
    """The stream of a device; of `cuda` without a number that of the current device."""
    return ComputeStream(device)
