"""A folder of downloaded and converted files, written atomically and shared by processes."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from models.errors import SourceError

logger = logging.getLogger(__name__)


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

        The file appears under its name only when it is complete. Its SHA-256 is kept beside it and
        checked here, so that a file that was damaged on disk is made again.
        """
        path = self.path(key, suffix)
        if _is_whole(path):
            if not _digest_path(path).exists():
                self._keep_digest(path)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock")):
            if not _is_whole(path):
                if path.exists():
                    logger.warning("%s was damaged on disk; making it again", path)
                with self.temporary_folder() as folder:
                    temporary = folder / path.name
                    make(temporary)
                    _digest_path(path).unlink(missing_ok=True)
                    digest = file_digest(temporary)
                    os.replace(temporary, path)
                    (folder / "digest").write_text(digest)
                    os.replace(folder / "digest", _digest_path(path))
        return path

    def _keep_digest(self, path: Path) -> None:
        """Keep the digest of a file that has none, so that damage is noticed from now on."""
        with suppress(OSError), self.temporary_folder() as folder:  # the store may be read-only
            (folder / "digest").write_text(file_digest(path))
            os.link(folder / "digest", _digest_path(path))  # replaces none written meanwhile

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


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _is_whole(path: Path) -> bool:
    """Whether the file exists and is what was written. A file without a digest, as earlier versions
    wrote it or other programs copied it, is believed."""
    if not path.is_file():
        return False
    try:
        expected = _digest_path(path).read_text()
    except OSError:
        return True
    return file_digest(path) == expected


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, source: str) -> None:
    """Raise SourceError unless the file's SHA-256 is `expected` (hexadecimal)."""
    actual = file_digest(path)
    if actual != expected.lower():
        raise SourceError(
            f"{source}: sha256 is {actual}, but {expected} is pinned; "
            "the file was changed at its source or damaged in transit"
        )
