"""Which images go to the device next. Pure policy: time is an argument, nothing here waits.

The device has lanes, each of which runs one batch at a time. On a GPU two lanes keep one batch
copying while another computes. On a CPU each lane is a stream with its share of the cores; there
lane 0 may also run a lone image wide, on all cores at once, while the other lanes keep still.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

# Of every so many places in a batch, one goes to bulk while both classes wait.
BULK_SHARE = 4


class QueueFull(Exception):
    """More images wait than the queue admits."""


@dataclass(slots=True, eq=False)
class Entry:
    """One image waiting. `flow` is its request: flows take turns. Times are in seconds."""

    payload: Any
    flow: Hashable = None
    bulk: bool = False
    deadline: float = math.inf
    cancelled: bool = False
    enqueued: float = 0.0

    def dead(self, now: float) -> bool:
        return self.cancelled or self.deadline <= now


@dataclass(slots=True, eq=False)
class Batch:
    """Entries to run together; a wide batch has the device to itself."""

    queue: "BatchQueue"
    entries: list[Entry]
    started: float
    wide: bool = False


Flows = OrderedDict[Hashable, deque[Entry]]


@dataclass(slots=True, eq=False)
class BatchQueue:
    """Images that wait for one trunk. `capacity` bounds images admitted but not yet running."""

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
        """Take `count` places, or raise QueueFull and take none."""
        if self.admitted + count > self.capacity:
            raise QueueFull(f"{self.admitted} images wait of at most {self.capacity}")
        self.admitted += count

    def release(self, count: int) -> None:
        """Give back places of images that will not be put."""
        self.admitted -= count

    def put(self, entry: Entry, now: float) -> None:
        """Append an admitted entry to its flow."""
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
        """Remove up to `limit` entries: one a flow in turn, interactive before bulk."""
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
        """When the entry that waits longest came; infinity if none waits."""
        return min((entry.enqueued for entry in self), default=math.inf)

    def due(self) -> float:
        """When a batch may leave at the earliest: at once, unless a delay was asked for."""
        if len(self) >= self.max_batch_size:
            return -math.inf
        return self.oldest() + self.max_delay_s if self.max_delay_s else self.oldest()


class Scheduler:
    """The queues of one device, and its lanes: how many batches are in flight at most.

    `cpu`: lanes share the cores. Then what waits is shared between them instead of filling one.
    """

    def __init__(self, *, lanes: int, cpu: bool = False) -> None:
        self.lanes = lanes
        self.cpu = cpu
        self.idle_since = -math.inf
        self.queues: dict[str, BatchQueue] = {}
        self.running: list[Batch] = []

    def next_batch(self, now: float, lane: int = 0) -> tuple[Batch | None, list[Entry]]:
        """The batch that this idle lane should run now, if any, and the entries found dead."""
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
        """A lane is idle again; what the batch cost refines the estimate of queued work."""
        self.running.remove(batch)
        if not self.running:
            self.idle_since = now
        lanes = self.lanes if batch.wide else 1
        cost = (now - batch.started) * lanes / len(batch.entries)
        known = batch.queue.lane_seconds_per_image
        batch.queue.lane_seconds_per_image = cost if not known else 0.8 * known + 0.2 * cost

    def next_due(self) -> float:
        """When to look again though nothing was put and no batch finished."""
        waiting = [queue for queue in self.queues.values() if len(queue)]
        return min((queue.due() for queue in waiting), default=math.inf)

    def queue_seconds(self) -> float:
        """Estimated time until all that is admitted now has been computed."""
        work = sum(q.admitted * q.lane_seconds_per_image for q in self.queues.values())
        return work / self.lanes

    def _runs_wide(self, queue: BatchQueue) -> bool:
        """Whether the one image that waits should have all cores: it does if it found the device
        idle. One that had to wait has company on the way, and side by side in their lanes the two
        get through sooner than one wide after the other."""
        waiting = sum(len(other) for other in self.queues.values())
        lone = waiting == 1 and not self.running and queue.oldest() >= self.idle_since
        return self.cpu and self.lanes > 1 and lone
