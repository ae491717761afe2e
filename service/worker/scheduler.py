"""Which images go to the device next. Pure policy: time is an argument, nothing here waits.

A lane is a thread that runs batches on the device, one at a time. On a GPU there are two lanes, so
that one batch is copied while another computes. On a CPU each lane has its share of the cores.
There, lane 0 may also run a single image as a wide batch: on all cores, while the other lanes are
idle.

A flow is the images of one request in one queue. Batches take from the flows in turn, so that a
large request does not delay a small one.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

# While both priorities wait, one place in this many goes to bulk requests.
BULK_SHARE = 4


class QueueFull(Exception):
    """The queue does not admit that many more images."""


@dataclass(slots=True, eq=False)
class Entry:
    """An image that waits in a queue.

    Args:
        flow: identifies the image's request.
        bulk: waits behind interactive requests.
        deadline: in seconds of the scheduler's clock.
        cancelled: the caller no longer needs the result.
        enqueued: when the entry was put, in seconds of the scheduler's clock.
    """

    payload: Any
    flow: Hashable = None
    bulk: bool = False
    deadline: float = math.inf
    cancelled: bool = False
    enqueued: float = 0.0

    def dead(self, now: float) -> bool:
        """Whether the entry is cancelled or past its deadline."""
        return self.cancelled or self.deadline <= now


@dataclass(slots=True, eq=False)
class Batch:
    """Entries to run together.

    Args:
        started: when it left the queue, in seconds of the scheduler's clock.
        wide: runs on all cores, and no other batch runs beside it.
    """

    queue: "BatchQueue"
    entries: list[Entry]
    started: float
    wide: bool = False


Flows = OrderedDict[Hashable, deque[Entry]]


@dataclass(slots=True, eq=False)
class BatchQueue:
    """The images that wait for one trunk.

    Args:
        capacity: the most images that are admitted but not yet running.
        max_delay_s: how long a partial batch waits for more images while the device is idle.
        lane_seconds_per_image: moving average of what an image costs; 0 before the first batch.
        admitted: images admitted but not yet running, including those being decoded.
    """

    name: str
    max_batch_size: int
    capacity: int
    max_delay_s: float = 0.0
    lane_seconds_per_image: float = 0.0
    admitted: int = 0
    _interactive: Flows = field(default_factory=OrderedDict)
    _bulk: Flows = field(default_factory=OrderedDict)
    _turn: int = 0

    def __len__(self) -> int:
        return sum(len(flow) for flow in chain(self._interactive.values(), self._bulk.values()))

    def __iter__(self) -> Iterator[Entry]:
        return chain(*self._interactive.values(), *self._bulk.values())

    def admit(self, count: int) -> None:
        """Reserve `count` places.

        Raises:
            QueueFull: fewer places are free; none is reserved.
        """
        if self.admitted + count > self.capacity:
            raise QueueFull(
                f"{self.admitted} of {self.capacity} places in the queue are taken; the request "
                f"needs {count}"
            )
        self.admitted += count

    def release(self, count: int) -> None:
        """Give back reserved places whose images will not be put."""
        self.admitted -= count

    def put(self, entry: Entry, now: float) -> None:
        """Append an entry, for which a place was reserved, to its flow."""
        entry.enqueued = now
        flows = self._bulk if entry.bulk else self._interactive
        flows.setdefault(entry.flow, deque()).append(entry)

    def sweep(self, now: float) -> list[Entry]:
        """Remove and return entries that are cancelled or past their deadline."""
        dead = [entry for entry in self if entry.dead(now)]
        for flows in (self._interactive, self._bulk) if dead else ():
            for flow, entries in list(flows.items()):
                alive = deque(entry for entry in entries if not entry.dead(now))
                if alive:
                    flows[flow] = alive
                else:
                    del flows[flow]
        self.admitted -= len(dead)
        return dead

    def take(self, limit: int) -> list[Entry]:
        """Remove and return up to `limit` entries.

        The flows take turns, one entry each. Interactive flows go before bulk ones, except in
        every `BULK_SHARE`-th turn.
        """
        taken: list[Entry] = []
        while len(taken) < limit and (self._interactive or self._bulk):
            self._turn += 1
            bulk_turn = not self._interactive or (self._bulk and self._turn % BULK_SHARE == 0)
            flows = self._bulk if bulk_turn else self._interactive
            flow, entries = flows.popitem(last=False)
            taken.append(entries.popleft())
            if entries:
                flows[flow] = entries
        self.admitted -= len(taken)
        return taken

    def oldest(self) -> float:
        """When the oldest entry was put; infinity if the queue is empty."""
        return min((entry.enqueued for entry in self), default=math.inf)

    def due(self) -> float:
        """The earliest time at which a batch may leave: at once, unless `max_delay_s` is set."""
        if len(self) >= self.max_batch_size:
            return -math.inf
        return self.oldest() + self.max_delay_s if self.max_delay_s else self.oldest()


class Scheduler:
    """The queues of one device, and the batches that run on it."""

    def __init__(self, *, lanes: int, cpu: bool = False) -> None:
        """
        Args:
            lanes: the number of lanes, which is the most batches in flight.
            cpu: the lanes share the cores of a CPU. Waiting images are then divided among the
                lanes, and single images may run as wide batches.
        """
        self.lanes = lanes
        self.cpu = cpu
        self.idle_since = -math.inf
        self.queues: dict[str, BatchQueue] = {}
        self.running: list[Batch] = []

    def next_batch(self, now: float, lane: int = 0) -> tuple[Batch | None, list[Entry]]:
        """The batch that an idle lane should run now, if any, and the dead entries removed."""
        dead = [entry for queue in self.queues.values() for entry in queue.sweep(now)]
        due = [queue for queue in self.queues.values() if len(queue) and queue.due() <= now]
        if not due or len(self.running) >= self.lanes or any(b.wide for b in self.running):
            return None, dead
        queue = min(due, key=BatchQueue.oldest)
        wide = self._runs_wide(queue)
        if wide and lane != 0:
            return None, dead
        share = math.ceil(len(queue) / self.lanes) if self.cpu else len(queue)
        batch = Batch(queue, queue.take(min(share, queue.max_batch_size)), now, wide)
        self.running.append(batch)
        return batch, dead

    def finish(self, batch: Batch, now: float) -> None:
        """Record that a batch has ended, and update its queue's cost per image."""
        self.running.remove(batch)
        if not self.running:
            self.idle_since = now
        lanes = self.lanes if batch.wide else 1
        cost = (now - batch.started) * lanes / len(batch.entries)
        average = batch.queue.lane_seconds_per_image
        batch.queue.lane_seconds_per_image = cost if not average else 0.8 * average + 0.2 * cost

    def next_due(self) -> float:
        """When to call `next_batch` again if no entry is put and no batch ends before then."""
        waiting = [queue for queue in self.queues.values() if len(queue)]
        return min((queue.due() for queue in waiting), default=math.inf)

    def queue_seconds(self) -> float:
        """Estimated seconds until all images admitted now have been computed."""
        work = sum(q.admitted * q.lane_seconds_per_image for q in self.queues.values())
        return work / self.lanes

    def _runs_wide(self, queue: BatchQueue) -> bool:
        """Whether the queue's next batch is wide.

        It is if it holds the only image that waits, and the device was idle when that image was
        put. If the image had to wait, more images are likely to follow soon, and two images
        side by side in their lanes finish sooner than two wide batches one after the other.
        """
        waiting = sum(len(other) for other in self.queues.values())
        single = waiting == 1 and not self.running and queue.oldest() >= self.idle_since
        return self.cpu and self.lanes > 1 and single
