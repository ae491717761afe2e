"""How much memory trunks take, and what loading a model will add."""

from collections.abc import Iterable

from models.catalog import ModelEntry
from models.checkpoints.sources import parse_source
from models.errors import ModelsError
from models.registry import Registry

MIB = 2**20


class TrunkSizes:
    """Bytes of a registry's trunks: their weights, and those that their engines hold besides."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        # Of trunks that have been loaded, as they were then.
        self._known: dict[str, int] = {}

    def loaded(self) -> set[str]:
        """The names of all trunks that are loaded."""
        names = list(self._registry.catalog.trunks)
        return {name for name in names if self._registry.loaded_trunk(name) is not None}

    def total(self, trunks: Iterable[str]) -> int:
        """Bytes of trunks by their names; 0 for one that has never been loaded."""
        return sum(map(self._size, trunks))

    def expected(self, entry: ModelEntry) -> int:
        """Bytes that loading a model adds: of its trunks when they were loaded last, otherwise of
        their files; 0 for other sources, whose sizes are not known before."""
        new = set(entry.trunks) - self.loaded()
        catalog = self._registry.catalog
        # A set, since the towers of a CLIP are two trunks of one file.
        sources = {catalog.trunk(trunk).source for trunk in new if not self._size(trunk)}
        return self.total(new) + sum(map(self._file_bytes, sources))

    def _size(self, trunk: str) -> int:
        if (loaded := self._registry.loaded_trunk(trunk)) is not None:
            self._known[trunk] = loaded.trunk.nbytes + loaded.trunk.engine.nbytes
        return self._known.get(trunk, 0)

    def _file_bytes(self, source: str) -> int:
        if not source.startswith("file:"):
            return 0
        try:
            path = self._registry.catalog.path.parent / parse_source(source).location
            return path.stat().st_size
        except (OSError, ValueError, ModelsError):
            return 0
