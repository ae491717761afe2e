"""Which models have changed since someone last asked, so that nobody describes all again."""

import secrets
import threading
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter

from models.description import ModelDescription
from service.describing import describe_each
from service.types import ModelChanges

# Models in one answer. More are fetched by asking again.
PAGE = 500
# Changes that are kept beyond two for each model.
SPARE = 1024


@dataclass(frozen=True, slots=True)
class Difference:
    """Names that have changed, were added or removed.

    Args:
        version: what to ask with next time.
        reset: forget all names received before; these are the first part of the full list.
        more: there are further ones; ask again.
    """

    version: str
    names: list[str]
    reset: bool = False
    more: bool = False


class ChangeLog:
    """The order in which names last changed. Every method may be called from any thread.

    A change costs the same however many names there are, and so does a question that nothing has
    changed for. Versions of another log, as of a process that was restarted, get everything.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoch = secrets.token_hex(8)
        # Numbers of changes, ascending, with their names. Only a name's latest one counts.
        self._log: list[tuple[int, str]] = []
        self._latest: dict[str, int] = {}  # in the order in which names were added
        # Those of `_latest` that were removed.
        self._removed: set[str] = set()
        self._number = 0
        # The change at which removed names were last forgotten. Older versions get everything.
        self._forgotten = 0

    def touch(self, name: str, *, removed: bool = False) -> None:
        """Note that a name has changed, or was removed."""
        with self._lock:
            self._number += 1
            self._log.append((self._number, name))
            self._latest[name] = self._number
            (self._removed.add if removed else self._removed.discard)(name)
            if len(self._log) > 2 * (len(self._latest) - len(self._removed)) + SPARE:
                self._compact()

    def since(self, version: str, limit: int = PAGE) -> Difference:
        """Up to `limit` names that have changed since a version; "" for everything."""
        with self._lock:
            number, place = self._parse(version)
            reset = number < self._forgotten
            if reset:
                number, place = self._number, 0
            return (
                self._changed(number, limit) if place is None else self._all(number, place, limit)
            )

    def _changed(self, number: int, limit: int) -> Difference:
        """The names that have changed since the change of that number."""
        names: list[str] = []
        begin = bisect_right(self._log, number, key=itemgetter(0))
        for place in range(begin, len(self._log)):
            changed, name = self._log[place]
            if self._latest[name] != changed:
                continue
            if len(names) == limit:
                return Difference(self._version(number), names, more=True)
            names.append(name)
            number = changed
        return Difference(self._version(self._number), names)

    def _all(self, number: int, place: int, limit: int) -> Difference:
        """The names from a place on, for one who begins with the change of that number."""
        names: list[str] = []
        reset = place == 0
        for name in islice(self._latest, place, None):
            if len(names) == limit:
                return Difference(self._version(number, place), names, reset, more=True)
            place += 1
            if name not in self._removed:
                names.append(name)
        return Difference(self._version(number), names, reset)

    def _version(self, number: int, place: int | None = None) -> str:
        return f"{self._epoch}.{number}" + ("" if place is None else f".{place}")

    def _parse(self, version: str) -> tuple[int, int | None]:
        """The number of a version, and the place in the list of everything if it is of a part."""
        epoch, *numbers = version.split(".")
        # No version has more digits, and `int` raises for thousands of them.
        if epoch != self._epoch or not all(n.isdecimal() and len(n) < 19 for n in numbers):
            return -1, None
        match numbers:
            case [number]:
                return int(number), None
            case [number, place]:
                return int(number), int(place)
        return -1, None

    def _compact(self) -> None:
        """Keep each name's latest change, and forget removed names."""
        if self._removed:
            self._forgotten = self._number
            for name in self._removed:
                del self._latest[name]
            self._removed.clear()
        self._log = [(number, name) for number, name in self._log if self._is_latest(number, name)]

    def _is_latest(self, number: int, name: str) -> bool:
        return self._latest.get(name) == number


async def changes_since(
    log: ChangeLog, version: str, describe: Callable[[str], ModelDescription | None]
) -> ModelChanges:
    """The models that have changed since a version, as they are now.

    Args:
        describe: returns None for a model that is gone.
    """
    difference = log.since(version)
    described = await describe_each(difference.names, describe)
    return ModelChanges(
        difference.version,
        models=list(filter(None, described.values())),
        removed=[name for name, model in described.items() if model is None],
        reset=difference.reset,
        more=difference.more,
    )
