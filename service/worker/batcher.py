"""The lanes: threads that run batches on the device, one at a time each."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from service.worker.batch_queue import BatchQueue, Entry
from service.worker.scheduler import Batch, Scheduler
from service.worker.trunk_keys import name_of

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
        # One lock for everything. Each lane waits on a condition of its own, so that a new image
        # wakes one lane and not all of them.
        self._lock = threading.Lock()
        self._wake_lane = [threading.Condition(self._lock) for _ in range(scheduler.lanes)]
        self._idle: set[int] = set()
        self._closing = self._closed = False
        self._threads = [
            threading.Thread(target=self._run_lane, args=(lane,), name=f"lane-{lane}", daemon=True)
            for lane in range(scheduler.lanes)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Run the batches that still wait, then stop the lanes."""
        with self._lock:
            self._closing = True
            for condition in self._wake_lane:
                condition.notify()
        for thread in self._threads:
            thread.join()
        self._closed = True

    def add_queue(self, queue: BatchQueue) -> None:
        with self._lock:
            self._scheduler.add(queue)

    def remove_queue(self, name: str) -> None:
        """Remove a queue; waits until it is empty and none of its batches is running. After
        `close` nothing empties it any more, so it is left as it is."""
        while not self._removed(name) and not self._closed:
            time.sleep(0.02)

    def _removed(self, name: str) -> bool:
        with self._lock:
            if (queue := self._scheduler.queues.get(name)) is None:
                return True
            if queue.admitted or any(batch.queue is queue for batch in self._scheduler.running):
                return False
            del self._scheduler.queues[name]
            return True

    def admit(self, name: str, count: int, client: str = "", *, bulk: bool = False) -> None:
        """Take places for images that are about to be decoded.

        Raises:
            QueueFull: the queue has fewer free places for this client; none is taken.
            KeyError: the queue was removed.
        """
        with self._lock:
            queue = self._scheduler.queues[name]
            if queue.admitted + count > queue.capacity:
                self._sweep(queue)
            queue.places.take(client, count, bulk=bulk)

    def admit_again(self, name: str, client: str, *, bulk: bool) -> None:
        """Take a place for an image that was admitted and is to be put once more, beyond the
        queue's capacity if it must. Called while the batch that had the image is running."""
        with self._lock:
            self._scheduler.queues[name].places.extend(client, 1, bulk=bulk)

    def has_place(self, name: str, client: str, *, bulk: bool) -> bool:
        """Whether a place is free for this client. True for a queue that does not exist."""
        with self._lock:
            queue = self._scheduler.queues.get(name)
            return queue is None or queue.places.fit(client, 1, bulk=bulk)

    def release(self, name: str, count: int, client: str = "", *, bulk: bool = False) -> None:
        """Give back places of images that will not be put."""
        with self._lock:
            self._scheduler.queues[name].places.give_back(client, count, bulk=bulk)
            self._wake()  # a batch may have waited for these images

    def put(self, name: str, entries: Sequence[Entry]) -> None:
        """Add the pieces of one input, for which one place was taken. The other pieces are in
        memory already, so they take places beyond the queue's capacity if they must. A batcher that
        is being closed drops them."""
        with self._lock:
            queue, now = self._scheduler.queues[name], self._clock()
            first = entries[0]
            if self._closing:  # the lanes may have ended; a model may still be loading
                queue.places.give_back(first.client, 1, bulk=first.bulk)
                for entry in entries:
                    self._drop(entry)
                return
            queue.places.extend(first.client, len(entries) - 1, bulk=first.bulk)
            for entry in entries:
                queue.put(entry, now)
            self._wake()

    def sweep(self, name: str) -> None:
        """Drop a queue's entries that are cancelled or past their deadline."""
        with self._lock:
            if (queue := self._scheduler.queues.get(name)) is not None:
                self._sweep(queue)

    def _sweep(self, queue: BatchQueue) -> None:
        for entry in queue.sweep(self._clock()):
            self._drop(entry)

    def alive(self) -> bool:
        """Whether the thread of every lane is alive."""
        return all(thread.is_alive() for thread in self._threads)

    def stuck_for(self) -> float:
        """Seconds since the oldest running batch started; 0 if no batch is running."""
        with self._lock:
            return max((self._clock() - b.started for b in self._scheduler.running), default=0.0)

    def depth(self) -> dict[str, int]:
        """Images admitted but not yet running, by trunk."""
        depths: Counter[str] = Counter()
        with self._lock:
            for key, queue in self._scheduler.queues.items():
                depths[name_of(key)] += queue.admitted
        return depths

    def in_flight(self) -> int:
        """The number of batches that are running."""
        with self._lock:
            return len(self._scheduler.running)

    def state(self) -> dict[str, Any]:
        """What waits and what runs, as JSON for people. Seconds of queues are estimates."""
        with self._lock:
            now, scheduler = self._clock(), self._scheduler
            return {
                "seconds": scheduler.queue_seconds(),
                "queues": {queue.name: queue.state() for queue in scheduler.queues.values()},
                "running": [
                    {
                        "trunk": batch.queue.name,
                        "images": len(batch.entries),
                        "seconds": now - batch.started,
                    }
                    for batch in scheduler.running
                ],
            }

    def queue_seconds(self) -> float:
        """Estimated seconds until all images admitted now have been computed."""
        with self._lock:
            return self._scheduler.queue_seconds()

    def forecast(
        self, counts: Mapping[str, int], client: str, *, bulk: bool, decoded: bool = False
    ) -> tuple[float, float]:
        """Estimated seconds until a client's further images are computed, once they are decoded.

        Args:
            counts: the number of images for each queue.
            decoded: the images go before all that are still to be decoded.

        Returns:
            The seconds until they run, and the seconds that they run.
        """
        with self._lock:
            queues = self._scheduler.queues
            known = [(queues[name], count) for name, count in counts.items() if name in queues]
            own, longest = 0.0, 0.0
            for queue, count in known:
                size = min(queue.limit.value, max(count, len(queue) // self._scheduler.lanes))
                own += count * queue.costs.per_image(size)
                longest = max(longest, queue.batch_seconds(size))
            now = self._clock()
            ahead = self._scheduler.seconds_ahead(client, own, now, bulk=bulk, decoded=decoded)
            return ahead, max(longest, own / self._scheduler.lanes)

    def _run_lane(self, lane: int) -> None:
        while (batch := self._wait_for_batch(lane)) is not None:
            try:
                self._execute(batch)
            except Exception:
                logger.exception("a batch of %s failed without results", batch.queue.name)
            with self._lock:
                self._scheduler.finish(batch, self._clock())
            del batch  # a lane that waits must not keep a trunk that is replaced meanwhile

    def _wait_for_batch(self, lane: int) -> Batch | None:
        with self._lock:
            while True:
                now = self._clock()
                batch, dead = self._scheduler.next_batch(now, lane)
                for entry in dead:
                    self._drop(entry)
                if batch is not None:
                    self._wake()
                    return batch
                if self._closing and not self._scheduler.is_waiting:
                    for condition in self._wake_lane:
                        condition.notify()
                    return None
                due = self._scheduler.next_due() - now
                # A due time in the past means that all lanes are busy. The lane whose batch ends
                # wakes another one.
                self._idle.add(lane)
                self._wake_lane[lane].wait(due if 0 < due < threading.TIMEOUT_MAX else None)
                self._idle.discard(lane)

    def _wake(self) -> None:
        """Wake an idle lane if an image waits. It wakes the next one when it has taken its share.

        The first lane goes first, since only it runs wide batches.
        """
        if self._idle and self._scheduler.is_waiting:
            lane = min(self._idle)
            self._idle.discard(lane)
            self._wake_lane[lane].notify()
