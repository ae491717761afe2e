"""Which images go to the device next. Pure policy: time is an argument, nothing here waits.

A lane is a thread that runs batches on the device, one at a time. On a GPU there are two lanes, so
that one batch is copied while another computes. On a CPU each lane has its share of the cores.
There, lane 0 may also run a single image as a wide batch: on all cores, while the other lanes are
idle.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

from service.worker.batch_queue import BatchQueue, Entry
from service.worker.turns import work_ahead
from service.worker.workload import NS, Workload

# How many clients' last turns are remembered.
MAX_CLIENTS = 1024


@dataclass(slots=True, eq=False)
class Batch:
    """Entries to run together.

    Args:
        started: when it left the queue, in seconds of the scheduler's clock.
        wide: runs on all cores, and no other batch runs beside it.
    """

    queue: BatchQueue
    entries: list[Entry]
    started: float
    wide: bool = False


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
        self._workload = Workload()
        # Queues whose part of it is out of date.
        self._changed: set[BatchQueue] = set()
        # The number of the last batch that began with an entry of the client.
        self._last_turns: OrderedDict[str | None, int] = OrderedDict()
        self._batches = 0

    def add(self, queue: BatchQueue) -> None:
        """Add a queue, which is empty."""
        self.queues[queue.name] = queue
        queue.gathering_lanes = self.lanes if self.cpu else 0
        queue.watch(self._waiting, self._changed)

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
            queue = min(due, key=self._turn) if len(due) > 1 else due[0]
            wide = self._runs_wide(queue)
            if wide and lane != 0:
                break
            share = math.ceil(len(queue) / self.lanes) if self.cpu else len(queue)
            self._take_turn(queue.next_client())
            entries, died = queue.take(min(share, queue.limit.value), now)
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
        batch.queue.ran(len(batch.entries), (now - batch.started) * lanes)

    def next_due(self) -> float:
        """When to call `next_batch` again if no entry is put and no batch ends before then."""
        return min((queue.due() for queue in self._waiting.values()), default=math.inf)

    def queue_seconds(self) -> float:
        """Estimated seconds until all images admitted now have been computed."""
        return self._work().seconds / self.lanes

    def seconds_ahead(
        self, client: str, own: float, now: float, *, bulk: bool, decoded: bool = False
    ) -> float:
        """Estimated seconds until the work that goes before a client's further images is done.

        Args:
            own: lane seconds of those images.
            decoded: count only images that wait in a queue, not those that are to be decoded.
        """
        work = self._work()
        waiting = work.decoded if decoded else work.admitted
        ahead = work_ahead(*waiting, client, own * NS, is_bulk=bulk) / NS
        return (ahead + sum(self._remaining(batch, now) for batch in self.running)) / self.lanes

    def _work(self) -> Workload:
        """What waits now."""
        for queue in self._changed:
            self._workload.update(queue)
        self._changed.clear()
        return self._workload

    def _remaining(self, batch: Batch, now: float) -> float:
        """Estimated lane seconds that a running batch still takes."""
        seconds = batch.queue.batch_seconds(len(batch.entries))
        elapsed = (now - batch.started) * (self.lanes if batch.wide else 1)
        return max(0.0, seconds - elapsed)

    def _turn(self, queue: BatchQueue) -> tuple[bool, int, float]:
        """The order among queues: first that of the client whose last turn is longest ago, last
        those that hold only late entries."""
        client = queue.next_client()
        return client is None, self._last_turns.get(client, 0), queue.oldest()

    def _take_turn(self, client: str | None) -> None:
        self._batches += 1
        self._last_turns[client] = self._batches
        self._last_turns.move_to_end(client)
        if len(self._last_turns) > MAX_CLIENTS:
            self._last_turns.popitem(last=False)

    def _runs_wide(self, queue: BatchQueue) -> bool:
        """Whether the queue's next batch is wide.

        It is if it holds the only image that waits, the device was idle when that image was put,
        and decoding leaves a core free. If the image had to wait, more images are likely to follow
        soon, and two images side by side in their lanes finish sooner than two wide batches one
        after the other.
        """
        if not self.cpu or self.lanes == 1 or self.running or not queue.runs_wide:
            return False
        alone = len(self._waiting) == 1 and len(queue) == 1 and not queue.decodes_on_all_cores
        return alone and queue.oldest() >= self.idle_since
