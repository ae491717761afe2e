"""The places of one queue, counted in images. A place is taken before an image is decoded."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

# One place in this many is kept for interactive requests.
KEPT_SHARE = 4


class QueueFull(Exception):
    """The queue does not admit that many more images."""


@dataclass(slots=True, eq=False)
class Places:
    """Who holds the places of a queue.

    Bulk requests leave one place in four free for interactive ones. When all places are taken, a
    client that holds less than its share still gets some of as many places again, so that one
    client cannot keep the others out.

    Args:
        on_change: called when images have taken places or given them back.
        interactive, bulk: images by client.
    """

    capacity: int
    on_change: Callable[[], None] = lambda: None
    taken: int = 0
    interactive: Counter[str] = field(default_factory=Counter)
    bulk: Counter[str] = field(default_factory=Counter)

    def take(self, client: str, count: int, *, bulk: bool) -> None:
        """Take `count` places.

        Raises:
            QueueFull: fewer are free for this client; none is taken.
        """
        if not self.fit(client, count, bulk=bulk):
            kind = "bulk " if bulk else ""
            raise QueueFull(
                f"{self.taken} of {self.capacity} places in the queue are taken; the {kind}request "
                f"needs {count}"
            )
        self.extend(client, count, bulk=bulk)

    def extend(self, client: str, count: int, *, bulk: bool) -> None:
        """Take `count` places beyond the capacity, if it must be."""
        (self.bulk if bulk else self.interactive)[client] += count
        self.taken += count
        self.on_change()

    def give_back(self, client: str, count: int, *, bulk: bool) -> None:
        """Give back `count` places."""
        held = self.bulk if bulk else self.interactive
        held[client] -= count
        if not held[client]:
            del held[client]
        self.taken -= count
        self.on_change()

    def fit(self, client: str, count: int, *, bulk: bool) -> bool:
        """Whether `count` places are free for this client."""
        kept = self.capacity // KEPT_SHARE
        held = self.interactive[client] + self.bulk[client] + count
        clients = (self.interactive.keys() | self.bulk.keys()) | {client}
        further = kept if len(clients) > 1 and held <= self.capacity // len(clients) else 0
        if bulk and self.bulk.total() + count > self.capacity - kept + further:
            return False
        return self.taken + count <= self.capacity + further
