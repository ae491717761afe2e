"""The lanes: threads that run batches on the device, one at a time each."""

import logging
import threading
import time
from collections.abc import Callable

from service.worker.scheduler import Batch, BatchQueue, Entry, Scheduler

logger = logging.getLogger(__name__)

Execute = Callable[[Batch], None]
Drop = Callable[[Entry], None]
Clock = Callable[[], float]


class Batcher:
    """Runs a scheduler with one thread per lane. All methods may be called from any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        execute: Execute,
        drop: Drop,
        clock: Clock = time.monotonic,
    ) -> None:
        """
        Args:
            execute: runs a batch and resolves all of its entries. If it raises, the lane logs the
                error and continues with the next batch.
            drop: resolves an entry that was cancelled or expired in its queue. Must not raise.
            clock: the time in seconds.
        """
        self._scheduler = scheduler
        self._execute = execute
        self._drop = drop
        self._clock = clock
        self._changed = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run_lane, args=(lane,), name=f"lane-{lane}", daemon=True)
            for lane in range(scheduler.lanes)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Run the batches that still wait, then stop the lanes."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def add_queue(self, queue: BatchQueue) -> None:
        with self._changed:
            self._scheduler.queues[queue.name] = queue

    def remove_queue(self, name: str) -> None:
        """Remove a queue; waits until it is empty and none of its batches is running."""
        with self._changed:
            while (queue := self._scheduler.queues.get(name)) is not None:
                busy = any(batch.queue is queue for batch in self._scheduler.running)
                if not busy and queue.admitted == 0:
                    del self._scheduler.queues[name]
                else:
                    self._changed.wait(0.05)

    def admit(self, name: str, count: int) -> None:
        """Reserve places for images that are about to be decoded.

        Raises:
            QueueFull: the queue has fewer free places; none is reserved.
            KeyError: the queue was removed.
        """
        with self._changed:
            queue = self._scheduler.queues[name]
            for entry in queue.sweep(self._clock()):
                self._drop(entry)
            queue.admit(count)

    def release(self, name: str, count: int) -> None:
        """Give back reserved places whose images will not be put."""
        with self._changed:
            self._scheduler.queues[name].release(count)

    def put(self, name: str, entry: Entry) -> None:
        """Add an entry for which a place was reserved."""
        with self._changed:
            self._scheduler.queues[name].put(entry, self._clock())
            self._changed.notify_all()  # not notify(): a wide batch can only run in lane 0

    def alive(self) -> bool:
        """Whether the thread of every lane is alive."""
        return all(thread.is_alive() for thread in self._threads)

    def stuck_for(self) -> float:
        """Seconds since the oldest running batch started; 0 if no batch is running."""
        with self._changed:
            return max((self._clock() - b.started for b in self._scheduler.running), default=0.0)

    def depth(self) -> dict[str, int]:
        """Images admitted but not yet running, by queue."""
        with self._changed:
            return {name: queue.admitted for name, queue in self._scheduler.queues.items()}

    def in_flight(self) -> int:
        """The number of batches that are running."""
        with self._changed:
            return len(self._scheduler.running)

    def queue_seconds(self) -> float:
        """Estimated seconds until all images admitted now have been computed."""
        with self._changed:
            return self._scheduler.queue_seconds()

    def _run_lane(self, lane: int) -> None:
        while (batch := self._wait_for_batch(lane)) is not None:
            try:
                self._execute(batch)
            except Exception:
                logger.exception("a batch of %s failed without results", batch.queue.name)
            with self._changed:
                self._scheduler.finish(batch, self._clock())
                self._changed.notify_all()

    def _wait_for_batch(self, lane: int) -> Batch | None:
        with self._changed:
            while True:
                now = self._clock()
                batch, dead = self._scheduler.next_batch(now, lane)
                for entry in dead:
                    self._drop(entry)
                if batch is not None:
                    return batch
                if self._closing and not any(map(len, self._scheduler.queues.values())):
                    return None
                due = self._scheduler.next_due() - now
                # A due time in the past means that all lanes are busy; the end of a batch notifies.
                self._changed.wait(due if 0 < due < threading.TIMEOUT_MAX else None)
