"""How a lane runs a pass: the batch to the device, the pass, and its outputs back.

On a GPU nothing in that waits for the device until the outputs are needed. A lane copies its batch
on a stream of its own, starts its pass behind the passes of other lanes, and then waits for its
outputs alone. With two lanes, one batch is therefore copied, and its pass started, while the other
one computes. A lane holds its pinned memory until its copies have ended, so lanes are the ring of
slots, and their number is the number of batches in flight.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from models.started_pass import Row, StartedPass
from models.trunks.compute_stream import compute_stream, on_stream
from models.trunks.jpeg_batch import JpegBatch
from models.trunks.transfers import packed, unpacked

# On the host. Files in it are decoded where it is moved to, on the thread's current stream.
Batch = Tensor | JpegBatch
Start = Callable[[Tensor], StartedPass]
Results = list[list[Row | Exception]]


class Device(Protocol):
    """Runs passes. Methods are called from the lanes' threads."""

    # Whether batches are to be in pinned memory.
    pins_memory: bool

    def run(self, batch: Batch, start: Start) -> Results:
        """The results of a pass.

        Args:
            start: starts the pass, given the batch on the device.
        """


CPU = torch.device("cpu")


class CpuDevice:
    """Computes in the calling thread."""

    pins_memory = False

    def run(self, batch: Batch, start: Start) -> Results:
        started = start(batch.to(CPU))
        return started.results(started.tensors)


class Streams(Protocol):
    """What `StreamDevice` needs of a GPU. An event is what a stream has reached at some time."""

    def copy_in(self, batch: Batch) -> tuple[Tensor, Any]:
        """Start to copy to the device. The copy, and the event of its end."""

    def computing(self, after: Any) -> AbstractContextManager[None]:
        """A context in which one thread at a time starts kernels, which run after an event."""

    def copy_out(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Start to copy to the host, once what computes now has ended. Called in `computing`.
        The copies, and the event of their end."""

    def wait(self, event: Any) -> None:
        """Wait for an event."""


class StreamDevice:
    """Computes on a device that works through streams of commands."""

    pins_memory = True

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def run(self, batch: Batch, start: Start) -> Results:
        on_device, arrived = self._streams.copy_in(batch)
        with self._streams.computing(arrived):
            started = start(on_device)
            copies, done = self._streams.copy_out(packed(started.tensors))
        self._streams.wait(done)
        return started.results(unpacked(copies, [tensor.shape for tensor in started.tensors]))


class CudaStreams:
    """The streams of an NVIDIA GPU: one that computes, and one for each lane's copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._compute = compute_stream(device)
        self._local = threading.local()

    def copy_in(self, batch: Batch) -> tuple[Tensor, Any]:
        with on_stream(stream := self._copies()):
            copy = batch.to(self._device, non_blocking=True)
            # A pass that fails to start frees it while its first kernels may still read it.
            self._compute.keep(copy)
            return copy, stream.record_event()

    @contextmanager
    def computing(self, after: Any) -> Any:
        with self._compute.use() as stream:
            stream.wait_event(after)
            yield

    def copy_out(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        computed = torch.cuda.current_stream(self._device).record_event()
        with on_stream(stream := self._copies()):
            stream.wait_event(computed)
            copies = []
            for tensor in tensors:
                # Its memory may be needed again before the copy has ended.
                tensor.record_stream(stream)
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies.append(host.copy_(tensor, non_blocking=True))
            # the waiting thread sleeps
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(stream)
        return copies, done

    def wait(self, event: Any) -> None:
        event.synchronize()

    def _copies(self) -> torch.cuda.Stream:
        """This lane's own stream."""
        if not hasattr(self._local, "stream"):
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._local.stream = stream
        own: torch.cuda.Stream = self._local.stream
        return own


def create_device(device: torch.device) -> Device:
    """How lanes run passes on a torch device."""
    return StreamDevice(CudaStreams(device)) if device.type == "cuda" else CpuDevice()
