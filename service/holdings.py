"""What clients hold of something that all of them share: places, bytes, connections."""

from collections import Counter
from math import ceil

# When everything is taken, a client that holds less than its share still gets some of a reserve,
# which grows with the clients towards one part in so many again: half of that for the second
# client, two thirds for the third. So there is some of it for the next one, until they are many.
FURTHER = 4


class Holdings:
    """What each client holds of a capacity, so that one client cannot keep the others out.

    Used on the event loop alone.

    Attributes:
        taken: by all clients together.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0
        self._held: Counter[str] = Counter()

    def fits(self, client: str, count: int) -> bool:
        """Whether a client can take so much more."""
        return self.taken + count <= self._limit(client, count)

    def has_share(self, client: str) -> bool:
        """Whether a client holds at least as much as clients do on average."""
        return self._held[client] * len(self._held) >= self.taken

    def take(self, client: str, count: int) -> None:
        """Count what a client takes."""
        self._held[client] += count
        self.taken += count

    def give_back(self, client: str, count: int) -> None:
        """Count what a client gives back."""
        self._held[client] -= count
        if not self._held[client]:
            del self._held[client]
        self.taken -= count

    def _limit(self, client: str, count: int) -> int:
        """How much may be taken if a client takes so much more."""
        others = len(self._held) - (client in self._held)
        is_below_share = others and self._held[client] + count <= self.capacity // (others + 1)
        if not is_below_share:
            return self.capacity
        return self.capacity + ceil(self.capacity * others / (FURTHER * (others + 1)))
