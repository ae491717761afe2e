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
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

# While both priorities wait, one place in this many goes to bulk requests.
BULK_SHARE = 4

# While decoding takes all cores of a CPU, a batch waits for this many images a lane, but never
# longer than this. A pass costs less per image the more images it holds (4 are half as expensive
# each as 1 for a small network), and the cores lose nothing meanwhile.
GATHER_IMAGES = 4
GATHER_S = 0.025


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
        gathering_lanes: the lanes for which a CPU's batches gather images while decoding takes all
            cores; 0 on other devices.
    """

    name: str
    max_batch_size: int
    capacity: int
    max_delay_s: float = 0.0
    lane_seconds_per_image: float = 0.0
    admitted: int = 0
    gathering_lanes: int = 0
    _interactive: Flows = field(default_factory=OrderedDict)
    _bulk: Flows = field(default_factory=OrderedDict)
    _length: int = 0
    _turn: int = 0
    # the scheduler's queues that are not empty, by name
    _waiting: "dict[str, BatchQueue]" = field(default_factory=dict)

    def __len__(self) -> int:
        return self._length

    def watch(self, waiting: "dict[str, BatchQueue]") -> None:
        """Be in `waiting`, by name, while the queue is not empty."""
        self._waiting = waiting

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
        self._length += 1
        self._waiting[self.name] = self

    def sweep(self, now: float) -> list[Entry]:
        """Remove and return entries that are cancelled or past their deadline."""
        dead: list[Entry] = []
        for flows in (self._interactive, self._bulk):
            for flow, entries in list(flows.items()):
                alive: deque[Entry] = deque()
                for entry in entries:  # asked once: other threads cancel entries meanwhile
                    (dead if entry.dead(now) else alive).append(entry)
                if alive:
                    flows[flow] = alive
                else:
                    del flows[flow]
        self._left(len(dead))
        return dead

    def take(self, limit: int, now: float) -> tuple[list[Entry], list[Entry]]:
        """Remove up to `limit` entries that are alive, and the dead ones before them.

        The flows take turns, one entry each. Interactive flows go before bulk ones, except in
        every `BULK_SHARE`-th turn.

        Returns:
            The entries that are alive, and those that are dead.
        """
        taken: list[Entry] = []
        dead: list[Entry] = []
        while len(taken) < limit and self._length > len(taken) + len(dead):
            self._turn += 1
            bulk_turn = not self._interactive or (self._bulk and self._turn % BULK_SHARE == 0)
            flows = self._bulk if bulk_turn else self._interactive
            flow, entries = flows.popitem(last=False)
            entry = entries.popleft()
            (dead if entry.dead(now) else taken).append(entry)
            if entries:
                flows[flow] = entries
        self._left(len(taken) + len(dead))
        return taken, dead

    def _left(self, count: int) -> None:
        """Account for entries that have left the queue."""
        self._length -= count
        self.admitted -= count
        if not self._length:
            self._waiting.pop(self.name, None)

    def oldest(self) -> float:
        """When the oldest entry was put; infinity if the queue is empty."""
        flows = chain(self._interactive.values(), self._bulk.values())
        return min((entries[0].enqueued for entries in flows), default=math.inf)

    def due(self) -> float:
        """The earliest time at which a batch may leave.

        That is at once, unless `max_delay_s` is set or the cores are taken by decoding.
        """
        gathers = self._gathers()
        if not (self.max_delay_s or gathers) or len(self) >= self.max_batch_size:
            return -math.inf
        return self.oldest() + max(self.max_delay_s, GATHER_S if gathers else 0.0)

    def _gathers(self) -> bool:
        """Whether decoding takes all cores, and few images are there yet."""
        return self.decodes_on_all_cores and len(self) < self.gathering_lanes * GATHER_IMAGES

    @property
    def decodes_on_all_cores(self) -> bool:
        """Whether at least as many images are to be decoded as a CPU has lanes."""
        return 0 < self.gathering_lanes <= self.admitted - len(self)


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
        # Dispatch looks only at these, so a thousand idle queues cost it nothing.
        self._waiting: dict[str, BatchQueue] = {}

    def add(self, queue: BatchQueue) -> None:
        """Add a queue, which is empty."""
        self.queues[queue.name] = queue
        queue.gathering_lanes = self.lanes if self.cpu else 0
        queue.watch(self._waiting)

    @property
    def is_waiting(self) -> bool:
        """Whether an image waits in a queue."""
        return bool(self._waiting)

    def next_batch(self, now: float, lane: int = 0) -> tuple[Batch | None, list[Entry]]:
        """The batch that an idle lane should run now, if any, and the dead entries removed."""
        dead: list[Entry] = []
        while len(self.running) < self.lanes and not any(batch.wide for batch in self.running):
            due = [queue for queue in self._waiting.values() if queue.due() <= now]
            if not due:
                break
            queue = min(due, key=BatchQueue.oldest) if len(due) > 1 else due[0]
            wide = self._runs_wide(queue)
            if wide and lane != 0:
                break
            share = math.ceil(len(queue) / self.lanes) if self.cpu else len(queue)
            entries, died = queue.take(min(share, queue.max_batch_size), now)
            dead += died
            if entries:
                batch = Batch(queue, entries, now, wide)
                self.running.append(batch)
                return batch, dead
        return None, dead

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
        return min((queue.due() for queue in self._waiting.values()), default=math.inf)

    def queue_seconds(self) -> float:
        """Estimated seconds until all images admitted now have been computed."""
        work = sum(q.admitted * q.lane_seconds_per_image for q in self.queues.values())
        return work / self.lanes

    def _runs_wide(self, queue: BatchQueue) -> bool:
        """Whether the queue's next batch is wide.

        It is if it holds the only image that waits, the device was idle when that image was put,
        and decoding leaves a core free. If the image had to wait, more images are likely to follow
        soon, and two images side by side in their lanes finish sooner than two wide batches one
        after the other.
        """
        if not self.cpu or self.lanes == 1 or self.running:
            return False
        alone = len(self._waiting) == 1 and len(queue) == 1 and not queue.decodes_on_all_cores
        return alone and queue.oldest() >= self.idle_since
