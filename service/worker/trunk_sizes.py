"""How much memory trunks take with their heads, and what loading them will add."""

from collections.abc import Callable, Iterable

from models.checkpoints.sources import parse_source
from models.errors import ModelsError
from models.registry import Registry

MIB = 2**20


class TrunkSizes:
    """The memory of a registry's trunks in bytes: the weights, what engines hold in addition, and
    the heads."""

    def __init__(self, registry: Registry, head_bytes: Callable[[str], int]) -> None:
        """
        Args:
            head_bytes: bytes of the loaded heads on a trunk.
        """
        self._registry = registry
        self._head_bytes = head_bytes
        # Of trunks that have been loaded, as they were then.
        self._known: dict[str, int] = {}

    def loaded(self) -> set[str]:
        """The names of all trunks that are loaded."""
        names = list(self._registry.catalog.trunks)
        return {name for name in names if self._registry.loaded_trunk(name) is not None}

    def total(self, trunks: Iterable[str]) -> int:
        """Bytes of trunks by their names; 0 for one that has never been loaded."""
        return sum(map(self._size, trunks))

    def expected(self, trunks: Iterable[str]) -> int:
        """Bytes that loading trunks adds: what they had when they were loaded last, otherwise the
        size of their files; 0 for other sources, whose sizes are not known before."""
        new = set(trunks) - self.loaded()
        catalog = self._registry.catalog
        # A set, since the towers of a CLIP are two trunks of one file.
        sources = {catalog.trunk(trunk).source for trunk in new if not self._size(trunk)}
        return self.total(new) + sum(map(self._file_bytes, sources))

    def _size(self, trunk: str) -> int:
        if (loaded := self._registry.loaded_trunk(trunk)) is not None:
            own = loaded.trunk.nbytes + loaded.trunk.engine.nbytes
            self._known[trunk] = own + self._head_bytes(trunk)
        return self._known.get(trunk, 0)

    def _file_bytes(self, source: str) -> int:
        if not source.startswith("file:"):
            return 0
        try:
            path = self._registry.catalog.path.parent / parse_source(source).location
            return path.stat().st_size
        except (OSError, ValueError, ModelsError):
            return 0
