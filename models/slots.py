"""The registry's places by name, and what follows from the states of all of them."""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count, islice

from models.catalog import ModelEntry
from models.description import State
from models.model import Model


@dataclass(slots=True, eq=False)
class Slot:
    """A catalog's model with its state. `lock` is held while it is loaded or unloaded."""

    entry: ModelEntry
    state: State = State.UNLOADED
    # Why loading failed.
    reason: str = ""
    model: Model | None = None
    # The name of the checkpoint format.
    format: str = ""
    load_seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    # Its place in the catalog's order, which `Slots.put` sets.
    position: int = -1

    def does(self, task: str) -> bool:
        """Whether the model is loaded and does the task."""
        model = self.model
        return model is not None and task in model.heads


class Slots:
    """Slots by name, in the catalog's order. Every method may be called from any thread.

    There may be a hundred thousand, so what follows from all their states is kept up to date with
    each change. Only where a task loses its first model, the next one is searched.

    Attributes:
        entries: the slots' entries by name.
    """

    def __init__(self, entries: Iterable[ModelEntry], on_change: Callable[[str], None]) -> None:
        """
        Args:
            on_change: called with the name of each model that was added, changed or removed, or
                that is a task's first model now or was it before.
        """
        self.entries: dict[str, ModelEntry] = {}
        self._on_change: Callable[[str], None] = lambda name: None
        # Which models may be a task's first.
        self.may_be_first: Callable[[ModelEntry], bool] = lambda entry: True
        self._positions = count()
        # Protects everything here, and the slots' states.
        self._lock = threading.Lock()
        self._by_name: dict[str, Slot] = {}
        self._states: Counter[State] = Counter()
        # For each task the first loaded model that does it.
        self._first: dict[str, Slot] = {}
        # For each trunk the models that are loaded or loading.
        self._users: defaultdict[str, set[str]] = defaultdict(set)
        for entry in entries:
            self.put(Slot(entry))
        self._on_change = on_change

    def get(self, name: str) -> Slot | None:
        """The slot of a model, if there is one."""
        return self._by_name.get(name)

    def names(self, start: int = 0, count: int | None = None) -> list[str]:
        """`count` names from place `start` on, or all."""
        with self._lock:
            return list(islice(self._by_name, start, None if count is None else start + count))

    def states(self) -> Mapping[State, int]:
        """The number of models in each state."""
        with self._lock:
            return Counter(self._states)

    def first(self, task: str) -> ModelEntry | None:
        """The first loaded model that does a task."""
        slot = self._first.get(task)
        return None if slot is None else slot.entry

    def firsts(self) -> set[str]:
        """The names of all tasks' first models."""
        with self._lock:
            return {slot.entry.name for slot in self._first.values()}

    def first_for(self, name: str) -> list[str]:
        """The tasks whose first model is that of this name."""
        with self._lock:
            return [task for task, slot in self._first.items() if slot.entry.name == name]

    def is_used(self, trunk: str) -> bool:
        """Whether a model on a trunk is loaded or loading."""
        with self._lock:
            return bool(self._users.get(trunk))

    def users(self, trunk: str) -> list[str]:
        """The models on a trunk that are loaded or loading."""
        with self._lock:
            return list(self._users.get(trunk, ()))

    def on_trunk(self, trunk: str) -> list[str]:
        """All models on a trunk."""
        with self._lock:
            return [name for name, entry in self.entries.items() if trunk in entry.trunks]

    def put(self, slot: Slot) -> None:
        """Add a slot, or replace the one of that name."""
        name = slot.entry.name
        with self._lock:
            if (old := self._by_name.get(name)) is not None:
                self._states[old.state] -= 1
                for trunk in old.entry.trunks:
                    self._users[trunk].discard(name)
            slot.position = next(self._positions) if old is None else old.position
            self._by_name[name] = slot
            self.entries[name] = slot.entry
            self._states[slot.state] += 1
            changed = self._follow(slot)
        self._report(changed)

    def remove(self, slot: Slot) -> Model | None:
        """Remove a slot. Returns its model, which it no longer has."""
        name = slot.entry.name
        with self._lock:
            if self._by_name.get(name) is not slot:
                return None
            del self._by_name[name], self.entries[name]
            self._states[slot.state] -= 1
            model, slot.model, slot.state = slot.model, None, State.UNLOADED
            changed = self._follow(slot)
        self._report(changed)
        return model

    def set_state(self, slot: Slot, state: State, reason: str = "") -> None:
        """Set a slot's state. Its model is set before."""
        with self._lock:
            old, slot.state, slot.reason = slot.state, state, reason
            if self._by_name.get(slot.entry.name) is not slot:  # replaced or removed meanwhile
                return
            self._states[old] -= 1
            self._states[state] += 1
            changed = self._follow(slot)
        self._report(changed)

    def _follow(self, slot: Slot) -> set[str]:
        """Bring trunks' users and tasks' first models up to date with a slot. Returns the names of
        the models for which something has changed."""
        name, in_use = slot.entry.name, slot.model is not None or slot.state is State.LOADING
        for trunk in slot.entry.trunks:
            (self._users[trunk].add if in_use else self._users[trunk].discard)(name)
        changed = {name}
        model = slot.model if self.may_be_first(slot.entry) else None
        for task in () if model is None else model.heads:
            first = self._first.get(task)
            if first is None or slot.position <= first.position:
                self._first[task] = slot
                changed |= {first.entry.name} if first is not None else set()
        lost = [
            task
            for task, first in self._first.items()
            if first.entry.name == name and not slot.does(task)
        ]
        for task in lost:
            del self._first[task]
            doing = (other for other in self._by_name.values() if other.does(task))
            following = (other for other in doing if self.may_be_first(other.entry))
            if (other := next(following, None)) is not None:
                self._first[task] = other
                changed.add(other.entry.name)
        return changed

    def _report(self, names: Iterable[str]) -> None:
        for name in names:
            self._on_change(name)
