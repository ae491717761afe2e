"""The trunks of a registry that are loaded."""

import gc
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from models.catalog import TrunkEntry
from models.checkpoints.loading import LoadedTrunk, load_trunk
from models.checkpoints.store import Store
from models.placements import Placements


class LoadedTrunks:
    """Trunks by name. Every method may be called from any thread."""

    def __init__(
        self, placements: Placements, store: Store, base: Path, device: torch.device
    ) -> None:
        """
        Args:
            base: the folder that paths in entries are relative to.
        """
        self._placements = placements
        self._store = store
        self._base = base
        self._device = device
        self._loaded: dict[str, LoadedTrunk] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        # How often each trunk's entry was replaced.
        self._versions: Counter[str] = Counter()

    def get(self, name: str) -> LoadedTrunk | None:
        """A trunk, or None if it is not loaded."""
        return self._loaded.get(name)

    def load(self, entry: TrunkEntry) -> LoadedTrunk:
        """An entry's trunk, which is loaded if it is not yet.

        Raises:
            SourceError, CheckpointError: it cannot be loaded.
        """
        with self._locks[entry.name]:
            if entry.name not in self._loaded:
                self._loaded[entry.name] = self._build(entry)
            return self._loaded[entry.name]

    def build_anew(self, entry: TrunkEntry) -> LoadedTrunk:
        """A new version of an entry's trunk, beside the one that is loaded.

        Raises:
            SourceError, CheckpointError: it cannot be loaded.
        """
        self._versions[entry.name] += 1
        return self._build(entry)

    def put(self, trunks: Mapping[str, LoadedTrunk]) -> None:
        """Replace trunks by new versions."""
        self._loaded |= trunks

    def drop(self, names: Iterable[str], is_used: Callable[[str], bool]) -> None:
        """Free the memory of those of these trunks that no model uses."""
        dropped = False
        for name in names:
            with self._locks[name]:
                dropped |= not is_used(name) and self._loaded.pop(name, None) is not None
        if dropped:
            gc.collect()  # a trunk, its engine and its hooks refer to each other
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _build(self, entry: TrunkEntry) -> LoadedTrunk:
        placement = self._placements.placement(entry)
        loaded = load_trunk(entry, self._store, self._base, placement)
        loaded.trunk.entry, loaded.trunk.version = entry, self._versions[entry.name]
        return replace(loaded, source=entry.source)
