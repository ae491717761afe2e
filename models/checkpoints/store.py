"""A folder of downloaded and converted files, written atomically and shared by processes."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from models.errors import SourceError


def default_store_path() -> Path:
    """`$VITRAIL_STORE`, else `vitrail` in the user's cache folder."""
    if path := os.environ.get("VITRAIL_STORE"):
        return Path(path)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vitrail"


class Store:
    """Files by key. If several processes need the same file, one makes it and the others wait."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_store_path()

    def get(self, key: str, suffix: str, make: Callable[[Path], None]) -> Path:
        """The file of a key, made by `make(temporary_path)` unless it exists.

        The file appears under its name only when it is complete.
        """
        path = self.path(key, suffix)
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            if not path.is_file():
                with self.temporary_folder() as folder:
                    temporary = folder / path.name
                    make(temporary)
                    os.replace(temporary, path)
        return path

    def path(self, key: str, suffix: str) -> Path:
        """The path of a key's file, which need not exist."""
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return self.root / digest[:2] / f"{digest}{suffix}"

    @contextmanager
    def temporary_folder(self) -> Iterator[Path]:
        """A folder on the store's file system, removed on exit."""
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root, prefix="tmp-") as folder:
            yield Path(folder)


def check_sha256(path: Path, expected: str, source: str) -> None:
    """Raise SourceError unless the file's SHA-256 is `expected` (hexadecimal)."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected.lower():
        raise SourceError(
            f"{source}: sha256 is {actual}, but {expected} is pinned; "
            "the file was changed at its source or damaged in transit"
        )
