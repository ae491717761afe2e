"""Runs a batch on the device: the trunk once, then each head on its rows."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.inference import HeadCall, start_pass
from models.inputs.jpeg_file import JpegFile
from models.started_pass import Row
from models.trunks.base import Trunk
from models.trunks.device_errors import is_lost, is_out_of_memory
from models.trunks.devices import one_thread
from models.trunks.jpeg_batch import JpegBatch, RefusedJpegError
from service import tracing
from service.metrics import Metrics
from service.worker.batch_queue import BatchQueue
from service.worker.device import Device
from service.worker.device_loss import exit_for_restart
from service.worker.scheduler import Batch
from service.worker.trunk_keys import name_of

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ItemResult:
    """The result of an item, and the time that it took.

    Args:
        rows: for each call of the item its row, or the error.
    """

    rows: Sequence[Row | Exception]
    queue_s: float
    compute_s: float
    batch_size: int


@dataclass(slots=True, eq=False)
class Item:
    """One preprocessed input, and the heads to run on it.

    Args:
        trunk: the key of the trunk's queue.
        prepared: as the trunk's `prepare` or `open_jpeg` returns it.
        calls: the heads; none for probes and warm-ups.
        done: called with the result, or with the error of an item that was dropped from its queue,
            or with RefusedJpegError if the CPU has to decode its file. It is called in a lane's
            thread, must be quick, and must not raise.
        trace: the span of its request, if that is recorded.
    """

    trunk: str
    prepared: Tensor | JpegFile
    calls: Sequence[HeadCall]
    done: "Done"
    trace: "SpanContext | None" = None

    @property
    def has_adapter(self) -> bool:
        """Whether its pass goes through an adapter: all of its heads' or none's."""
        return any(call.head.request.adapter for call in self.calls[:1])

    @classmethod
    def awaited(
        cls, trunk: str, prepared: Tensor, calls: Sequence[HeadCall] = ()
    ) -> "tuple[Item, Future[ItemResult]]":
        """An item with a future for its result."""
        future: Future[ItemResult] = Future()

        def done(result: ItemResult | Exception) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

        return cls(trunk, prepared, calls, done), future


Done = Callable[[ItemResult | Exception], None]


@dataclass(frozen=True, slots=True)
class Threads:
    """The CPU threads of a pass.

    Args:
        lane: of a batch in its lane.
        wide: of a wide batch, which runs alone.
    """

    lane: int
    wide: int


def use_threads(count: int) -> None:
    """Give torch's operators `count` CPU threads when called from this thread.

    At most one thread of a process should use more than one. GNU's OpenMP keeps a pool of threads
    for each such thread. Once the pools hold more threads than there are cores, OpenMP puts waiting
    threads to sleep at every barrier. Single images of EfficientNet-lite0 then run at 35 instead of
    96 per second on two cores (benchmarks/streams.py).
    """
    # Reading the count first makes torch initialize the thread, which would reset it later.
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


class Runner:
    """Runs the passes of one trunk. Called from the lanes' threads."""

    def __init__(
        self, key: str, trunk: Trunk, device: Device, threads: Threads, metrics: Metrics
    ) -> None:
        self.key = key
        self.name = name_of(key)
        self.trunk = trunk
        self._device = device
        self._threads = threads
        self._metrics = metrics
        # When a pass last succeeded, in `time.monotonic` seconds.
        self.last_passed = time.monotonic()

    def execute(self, batch: Batch) -> None:
        """Run a batch and resolve all of its entries, with results or with errors."""
        use_threads(self._threads.wide if batch.wide else self._threads.lane)
        started = time.monotonic()
        results = self._run_safely(batch.queue, [entry.payload for entry in batch.entries])
        ended = time.monotonic()
        compute_s = ended - started
        size = len(batch.entries)
        # Probes and warm-ups have no calls and are not counted.
        counted = [entry for entry in batch.entries if entry.payload.calls]
        if counted:
            self._metrics.batch_size.labels(self.name).observe(size)
        for entry in counted:
            queue_s = batch.started - entry.enqueued
            exemplar = tracing.exemplar(entry.payload.trace)
            self._metrics.stage_duration.labels("queue", self.name).observe(queue_s, exemplar)
            self._metrics.stage_duration.labels("compute", self.name).observe(compute_s, exemplar)
        if tracing.is_on():
            waited = [(e.payload.trace, e.enqueued) for e in counted if e.payload.trace]
            tracing.add_batch(self.name, size, waited, started, ended)
        for entry, rows in zip(batch.entries, results, strict=True):
            queue_s = batch.started - entry.enqueued
            refusal = next((row for row in rows if isinstance(row, RefusedJpegError)), None)
            entry.payload.done(refusal or ItemResult(rows, queue_s, compute_s, size))

    def blank_item(self) -> "tuple[Item, Future[ItemResult]]":
        """A blank input without heads, to check that the trunk works, and its result."""
        return Item.awaited(self.key, self.trunk.blank())

    def _run_safely(self, queue: BatchQueue, items: list[Item]) -> list[list[Row | Exception]]:
        """Run items, and retry if the trunk fails, so that only the item at fault fails.

        If memory runs out, the batch is halved, and so are later ones for a while. After any other
        error the items run one by one. A lost device ends the process.
        """
        try:
            results = self._run(items)
        except Exception as error:
            failure = error
        else:
            queue.limit.ran(len(items))
            return results
        self._metrics.trunk_failures.labels(self.name).inc()
        if is_lost(failure, self.trunk.placement.device):
            exit_for_restart(failure)
        out_of_memory = is_out_of_memory(failure)
        if out_of_memory:
            # Its frames hold the batch's tensors, whose memory the retry needs.
            failure.__traceback__ = failure.__context__ = None
            torch.cuda.empty_cache()
            queue.limit.ran_out(len(items))
        if len(items) == 1:
            return [[failure] * max(1, len(items[0].calls))]
        if out_of_memory:
            half = len(items) // 2
            logger.warning("%s: out of memory; batches now hold %d", self.name, queue.limit.value)
            return self._run_safely(queue, items[:half]) + self._run_safely(queue, items[half:])
        logger.warning("%s: a batch failed, retrying one by one", self.name, exc_info=failure)
        return [self._run_safely(queue, [item])[0] for item in items]

    def _run(self, items: Sequence[Item]) -> list[list[Row | Exception]]:
        """Run items, in one pass for each input size. Those with adapters have passes of their own
        if the trunk's engine leaves them to another one, or if others have query tokens, which the
        adapters would change."""
        if self.trunk.modality == "text":  # texts are padded to one size
            return self._run_pass(items)
        splits = self.trunk.splits_adapters or any(
            call.head.request.queries is not None for item in items for call in item.calls
        )
        sizes: dict[tuple[tuple[int, ...], bool], list[int]] = defaultdict(list)
        for place, item in enumerate(items):
            sizes[item.prepared.shape, splits and item.has_adapter].append(place)
        results: list[list[Row | Exception]] = [[]] * len(items)
        for places in sizes.values():
            passed = self._run_pass([items[place] for place in places])
            for place, rows in zip(places, passed, strict=True):
                results[place] = rows
        return results

    def _run_pass(self, items: Sequence[Item]) -> list[list[Row | Exception]]:
        with one_thread():
            batch = self.trunk.batch(
                [item.prepared for item in items], pin_memory=self._device.pins_memory
            )
        calls = [item.calls for item in items]
        results = self._device.run(batch, lambda moved: start_pass(self.trunk, moved, calls))
        self.last_passed = time.monotonic()
        if isinstance(batch, JpegBatch):
            self._metrics.refused_files.labels(self.name).inc(len(batch.refused))
            for row in batch.refused:
                results[row] = [RefusedJpegError()] * len(calls[row])
        return results
