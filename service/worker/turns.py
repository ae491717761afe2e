"""Clients take turns, and so do the requests of each client. Pure policy: nothing here waits.

A client is an API key, or else an address. A flow is one request. Each turn takes one item, so that
neither a client with many requests nor a request with many images delays the others.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

# While both priorities wait, one turn in this many goes to bulk requests.
BULK_SHARE = 4

Flows = OrderedDict[Hashable, deque[T]]


@dataclass(slots=True, eq=False)
class Turns(Generic[T]):
    """Items of one priority that wait, by client and flow.

    Args:
        counts: the number of items of each client.
    """

    counts: Counter[str] = field(default_factory=Counter)
    _clients: OrderedDict[str, Flows[T]] = field(default_factory=OrderedDict)

    def __bool__(self) -> bool:
        return bool(self._clients)

    def put(self, item: T, client: str, flow: Hashable) -> None:
        """Append an item to its flow."""
        flows = self._clients.setdefault(client, OrderedDict())
        flows.setdefault(flow, deque()).append(item)
        self.counts[client] += 1

    def take(self) -> T:
        """Remove the item whose turn it is."""
        client, flows = self._clients.popitem(last=False)
        flow, items = flows.popitem(last=False)
        item = items.popleft()
        if items:
            flows[flow] = items
        if flows:
            self._clients[client] = flows
        self._left(client, 1)
        return item

    def remove(self, where: Callable[[T], bool]) -> list[T]:
        """Remove and return the items for which `where` is true."""
        removed: list[T] = []
        for client, flows in list(self._clients.items()):
            for flow, items in list(flows.items()):
                kept: deque[T] = deque()
                for item in items:  # asked once: other threads may change the answer meanwhile
                    (removed if where(item) else kept).append(item)
                self._left(client, len(items) - len(kept))
                if kept:
                    flows[flow] = kept
                else:
                    del flows[flow]
            if not flows:
                del self._clients[client]
        return removed

    def _left(self, client: str, count: int) -> None:
        self.counts[client] -= count
        if not self.counts[client]:
            del self.counts[client]

    def next_client(self) -> str | None:
        """The client whose turn it is."""
        return next(iter(self._clients), None)


class Waiting(Generic[T]):
    """Items of both priorities. Interactive ones go first, except in every BULK_SHARE-th turn."""

    def __init__(self) -> None:
        self.interactive: Turns[T] = Turns()
        self.bulk: Turns[T] = Turns()
        self._length = 0
        self._turn = 0

    def __len__(self) -> int:
        return self._length

    def put(self, item: T, client: str, flow: Hashable, *, bulk: bool) -> None:
        """Append an item to its flow."""
        (self.bulk if bulk else self.interactive).put(item, client, flow)
        self._length += 1

    def take(self) -> T:
        """Remove the item whose turn it is."""
        self._turn += 1
        self._length -= 1
        is_bulk_turn = not self.interactive or (self.bulk and self._turn % BULK_SHARE == 0)
        return (self.bulk if is_bulk_turn else self.interactive).take()

    def remove(self, where: Callable[[T], bool]) -> list[T]:
        """Remove and return the items for which `where` is true."""
        removed = self.interactive.remove(where) + self.bulk.remove(where)
        self._length -= len(removed)
        return removed

    def next_client(self) -> str | None:
        """The client whose turn it is, but for bulk turns."""
        return (self.interactive or self.bulk).next_client()


Work = Mapping[str, float]


def work_ahead(
    interactive: Work, bulk: Work, client: str, own: float = 0.0, *, is_bulk: bool
) -> float:
    """The work that is done before `own` further work of a client is, without `own` itself.

    Since clients take turns, no other client's work counts for more than the client's.

    Args:
        interactive, bulk: work that waits, by client.
    """
    same, other = (bulk, interactive) if is_bulk else (interactive, bulk)
    mine = same.get(client, 0.0) + own
    ahead = sum(min(work, mine) for name, work in same.items() if name != client) + mine
    turns = BULK_SHARE - 1.0 if is_bulk else 1 / (BULK_SHARE - 1)
    return ahead - own + min(sum(other.values()), ahead * turns)
