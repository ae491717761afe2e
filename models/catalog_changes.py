"""What differs between two readings of a catalog, in parts that are applied one by one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from models.catalog import Catalog, ModelEntry, TrunkEntry

# Modification time in ns and size in bytes of each local file that an entry names.
Stamps = tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Edition:
    """A catalog's entries, with the state of the local files that they name.

    Files are compared by modification time and size, not by content.
    """

    trunks: dict[str, tuple[TrunkEntry, Stamps]] = field(default_factory=dict)
    models: dict[str, tuple[ModelEntry, Stamps]] = field(default_factory=dict)

    @classmethod
    def of(cls, catalog: Catalog) -> "Edition":
        """The edition that a catalog is at now."""
        base = catalog.path.parent
        return cls(
            {n: (e, _stamps(base, _trunk_files(e))) for n, e in catalog.trunks.items()},
            {n: (e, _stamps(base, _model_files(e))) for n, e in catalog.models.items()},
        )


@dataclass(frozen=True, slots=True)
class Change:
    """Entries that are new or changed, and have to be replaced together.

    Args:
        models: also those that are as before, on trunks that are not.
    """

    trunks: Mapping[str, TrunkEntry]
    models: Mapping[str, ModelEntry]


def changes(old: Edition, new: Edition) -> list[Change]:
    """The smallest changes from one edition to another, but for what is removed.

    A model is replaced together with its trunks, so what one trunk's models share is one change.
    """
    trunks = {name for name, each in new.trunks.items() if old.trunks.get(name) != each}
    models: dict[str, set[str]] = {}  # with the changed trunks that they use or used
    for name, (entry, stamps) in new.models.items():
        used = set(entry.trunks)
        if (before := old.models.get(name)) is not None:
            used.update(before[0].trunks)
        if before != (entry, stamps) or used & trunks:
            models[name] = used & trunks
    group_of = {name: {name} for name in new.trunks if name in trunks}
    for used in models.values():
        merged = set[str]().union(*(group_of[trunk] for trunk in used))
        group_of |= dict.fromkeys(merged, merged)
    found = {
        id(group): Change({t: new.trunks[t][0] for t in sorted(group)}, {})
        for group in group_of.values()
    }
    alone: list[Change] = []
    for name, used in models.items():
        entry = new.models[name][0]
        if used:
            group = found[id(group_of[next(iter(used))])]
            group.models[name] = entry  # type: ignore[index]
        else:
            alone.append(Change({}, {name: entry}))
    return [*found.values(), *alone]


def _trunk_files(entry: TrunkEntry) -> Iterable[str]:
    named = (entry.source, entry.tokenizer or "")
    yield from (each.removeprefix("file:") for each in named if each.startswith("file:"))
    if entry.calibration is not None:
        yield entry.calibration


def _model_files(entry: ModelEntry) -> Iterable[str]:
    if entry.head is not None and entry.head.startswith("file:"):
        yield entry.head.removeprefix("file:")
    if isinstance(entry.labels, str):
        yield entry.labels


def _stamps(base: Path, files: Iterable[str]) -> Stamps:
    return tuple(_stamp(base / file) for file in files)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except (OSError, ValueError):  # it is missing, or not a file but the name of a set of labels
        return 0, 0
    return status.st_mtime_ns, status.st_size
