"""What tells the versions of a trunk apart while one replaces another: the keys of their queues."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.trunks.base import Trunk


def key_of(trunk: "Trunk") -> str:
    """The key of a trunk's queue: its name in the catalog, and its version once it was replaced."""
    name = trunk.entry.name if trunk.entry is not None else trunk.architecture
    return f"{name} #{trunk.version}" if trunk.version else name


def name_of(key: str) -> str:
    """The name of the trunk with that key. The catalog has no names that look like versions."""
    name, _, version = key.rpartition(" #")
    return name if name and version.isdigit() else key
