"""The images that wait for one trunk. Pure policy: time is an argument, nothing here waits."""

import math
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import InitVar, dataclass, field
from typing import Any

from service.worker.batch_limit import BatchLimit
from service.worker.costs import BatchCosts
from service.worker.places import Places
from service.worker.turns import Waiting

# While decoding takes all cores of a CPU, a batch waits for this many images a lane, but never
# longer than this. A pass costs less per image the more images it holds (4 are half as expensive
# each as 1 for a small network), and the cores lose nothing meanwhile.
GATHER_IMAGES = 8
GATHER_S = 0.05


@dataclass(slots=True, eq=False)
class Entry:
    """An image that waits in a queue.

    Args:
        flow: identifies the image's request.
        bulk: waits behind interactive requests.
        deadline: in seconds of the scheduler's clock.
        client: takes turns with other clients.
        cancelled: the caller no longer needs the result.
        enqueued: when the entry was put, in seconds of the scheduler's clock.
    """

    payload: Any
    flow: Hashable = None
    bulk: bool = False
    deadline: float = math.inf
    client: str = ""
    cancelled: bool = False
    enqueued: float = 0.0

    def dead(self, now: float) -> bool:
        """Whether the entry is cancelled or past its deadline."""
        return self.cancelled or self.deadline <= now


@dataclass(slots=True, eq=False)
class BatchQueue:
    """The images that wait for one trunk.

    Args:
        max_batch_size: the most images in a batch, while memory suffices.
        capacity: the most images that are admitted but not yet running.
        max_delay_s: how long a partial batch waits for more images while the device is idle.
        gathering_lanes: the lanes for which a CPU's batches gather images while decoding takes all
            cores; 0 on other devices.
        runs_wide: whether a lone image may run on all of a CPU's cores.
    """

    name: str
    max_batch_size: InitVar[int]
    capacity: int
    max_delay_s: float = 0.0
    gathering_lanes: int = 0
    runs_wide: bool = True
    # The most images in a batch now.
    limit: BatchLimit = field(init=False)
    costs: BatchCosts = field(default_factory=BatchCosts)
    places: Places = field(init=False)
    decoded: Waiting[Entry] = field(default_factory=Waiting)
    # Entries that cannot be computed before their deadline, as far as is known.
    _late: deque[Entry] = field(default_factory=deque)
    # All entries, in the order in which they were put.
    _order: OrderedDict[Entry, None] = field(default_factory=OrderedDict)
    # the scheduler's queues that are not empty, by name, and those in which something has changed
    _waiting: "dict[str, BatchQueue]" = field(default_factory=dict)
    _changed: "set[BatchQueue]" = field(default_factory=set)

    def __post_init__(self, max_batch_size: int) -> None:
        self.limit = BatchLimit(max_batch_size)
        self.places = Places(self.capacity, self._note_change)

    def __len__(self) -> int:
        return len(self.decoded) + len(self._late)

    @property
    def admitted(self) -> int:
        """Images admitted but not yet running, including those being decoded."""
        return self.places.taken

    def state(self) -> dict[str, Any]:
        """Its images, by client, as JSON for people."""
        return {
            "capacity": self.capacity,
            "admitted_images": self.admitted,
            "decoded_images": len(self),
            "late_images": len(self._late),
            "pass_seconds": self.costs.passes(),
            "admitted": {
                "interactive": dict(self.places.interactive),
                "bulk": dict(self.places.bulk),
            },
        }

    def watch(self, waiting: "dict[str, BatchQueue]", changed: "set[BatchQueue]") -> None:
        """Be in `waiting`, by name, while the queue is not empty, and in `changed` whenever images
        or their costs have changed."""
        self._waiting = waiting
        self._changed = changed

    def _note_change(self) -> None:
        self._changed.add(self)

    def ran(self, size: int, seconds: float) -> None:
        """Count a batch of `size` images that took `seconds` of one lane."""
        self.costs.add(size, seconds)
        self._note_change()

    def put(self, entry: Entry, now: float) -> None:
        """Append an entry, for which a place was taken, to its flow."""
        entry.enqueued = now
        self.decoded.put(entry, entry.client, entry.flow, bulk=entry.bulk)
        self._order[entry] = None
        self._waiting[self.name] = self
        self._note_change()

    def sweep(self, now: float) -> list[Entry]:
        """Remove and return entries that are cancelled or past their deadline."""
        dead = self.decoded.remove(lambda entry: entry.dead(now))
        for _ in range(len(self._late)):
            entry = self._late.popleft()
            (dead if entry.dead(now) else self._late).append(entry)
        self._left(dead)
        return dead

    def take(self, limit: int, now: float) -> tuple[list[Entry], list[Entry]]:
        """Remove up to `limit` entries that are alive, and the dead ones before them.

        Entries that would still be computing at their deadline run only when no others wait.

        Returns:
            The entries that are alive, and those that are dead.
        """
        taken: list[Entry] = []
        dead: list[Entry] = []
        ready = now + self.batch_seconds(min(limit, len(self)))
        while len(taken) < limit and self.decoded:
            entry = self.decoded.take()
            if entry.dead(now):
                dead.append(entry)
            elif entry.deadline < ready:
                self._late.append(entry)
            else:
                taken.append(entry)
        while not taken and self._late:
            for _ in range(min(limit, len(self._late))):
                entry = self._late.popleft()
                (dead if entry.dead(now) else taken).append(entry)
        self._left(taken + dead)
        return taken, dead

    def _left(self, entries: list[Entry]) -> None:
        """Give back the places of entries that have left the queue."""
        for entry in entries:
            del self._order[entry]
            self.places.give_back(entry.client, 1, bulk=entry.bulk)
        if not len(self):
            self._waiting.pop(self.name, None)

    def batch_seconds(self, size: int) -> float:
        """Estimated lane seconds of a batch of that size; 0 before the first batch."""
        return size * self.costs.per_image(size) if size else 0.0

    def next_client(self) -> str | None:
        """The client whose turn it is; None if only late entries wait."""
        return self.decoded.next_client()

    def oldest(self) -> float:
        """When the oldest entry was put; infinity if the queue is empty."""
        entry = next(iter(self._order), None)
        return math.inf if entry is None else entry.enqueued

    def due(self) -> float:
        """The earliest time at which a batch may leave.

        That is at once, unless `max_delay_s` is set or the cores are taken by decoding.
        """
        gathers = self._gathers()
        if not (self.max_delay_s or gathers) or len(self) >= self.limit.value:
            return -math.inf
        return self.oldest() + max(self.max_delay_s, GATHER_S if gathers else 0.0)

    def _gathers(self) -> bool:
        """Whether decoding takes all cores, and few images are there yet."""
        return self.decodes_on_all_cores and len(self) < self.gathering_lanes * GATHER_IMAGES

    @property
    def decodes_on_all_cores(self) -> bool:
        """Whether at least as many images are to be decoded as a CPU has lanes."""
        return 0 < self.gathering_lanes <= self.admitted - len(self)
