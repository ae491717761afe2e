"""The lanes: threads that take batches from the scheduler and run them."""

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
    """Runs a scheduler with one thread a lane. All methods may be called from any thread.

    `execute` answers every entry of a batch; `drop` answers an entry that died waiting. Neither
    may raise: if one does, the lane logs it and goes on.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        execute: Execute,
        drop: Drop,
        clock: Clock = time.monotonic,
    ) -> None:
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
        """Run what waits, then stop the lanes."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def add_queue(self, queue: BatchQueue) -> None:
        with self._changed:
            self._scheduler.queues[queue.name] = queue

    def remove_queue(self, name: str) -> None:
        """Forget a queue once nothing waits in it or runs from it."""
        with self._changed:
            while (queue := self._scheduler.queues.get(name)) is not None:
                busy = any(batch.queue is queue for batch in self._scheduler.running)
                if not busy and queue.admitted == 0:
                    del self._scheduler.queues[name]
                else:
                    self._changed.wait(0.05)

    def admit(self, name: str, count: int) -> None:
        """Reserve places for images about to be decoded; raises QueueFull, or KeyError for a
        queue that is gone."""
        with self._changed:
            queue = self._scheduler.queues[name]
            for entry in queue.sweep(self._clock()):
                self._drop(entry)
            queue.admit(count)

    def release(self, name: str, count: int) -> None:
        with self._changed:
            self._scheduler.queues[name].release(count)

    def put(self, name: str, entry: Entry) -> None:
        with self._changed:
            self._scheduler.queues[name].put(entry, self._clock())
            self._changed.notify_all()  # a lone image is for lane 0, which one alone may not be

    def alive(self) -> bool:
        """Whether every lane's thread runs."""
        return all(thread.is_alive() for thread in self._threads)

    def stuck_for(self) -> float:
        """Seconds that the longest running batch has been running; 0 if none runs."""
        with self._changed:
            return max((self._clock() - b.started for b in self._scheduler.running), default=0.0)

    def depth(self) -> dict[str, int]:
        """Images admitted and not yet running, by queue."""
        with self._changed:
            return {name: queue.admitted for name, queue in self._scheduler.queues.items()}

    def in_flight(self) -> int:
        """Batches running now."""
        with self._changed:
            return len(self._scheduler.running)

    def queue_seconds(self) -> float:
        with self._changed:
            return self._scheduler.queue_seconds()

    def _run_lane(self, lane: int) -> None:
        while (batch := self._wait_for_batch(lane)) is not None:
            try:
                self._execute(batch)
            except Exception:
                logger.exception("a batch of %s failed unanswered", batch.queue.name)
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
                # a due time in the past means that the lanes are busy: finish() will notify
                self._changed.wait(due if 0 < due < threading.TIMEOUT_MAX else None)
