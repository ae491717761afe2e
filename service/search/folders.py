"""Images in folders of this machine, found and read without following symbolic links.

Each folder on the way is opened by its name in the one above it and refused if it is a link, so
that nothing outside can be reached, not even while another process exchanges folders for links.
"""

import heapq
import math
import os
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath

from models.inputs.images import SUFFIXES
from service.errors import (
    DeadlineExceededError,
    InvalidInputError,
    NotFoundError,
    PayloadTooLargeError,
)
from service.search.collection import MAX_ID, Metadata

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Opening a named pipe would wait for its writer.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file, and what tells whether it changed since: bytes, and milliseconds since 1970."""

    path: str
    size: int
    modified_ms: int

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> "ImageFile":
        return cls(path, status.st_size, status.st_mtime_ns // 1_000_000)

    @property
    def metadata(self) -> dict[str, str | int]:
        """What its image has in a collection."""
        folder = PurePosixPath(self.path).parent.name
        return {"folder": folder, "size": self.size, "modified_ms": self.modified_ms}

    def is_unchanged(self, metadata: Metadata) -> bool:
        """Whether an image with this metadata was made of the file as it is now."""
        return all(metadata.get(name) == value for name, value in self.metadata.items())


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What cannot be read, a file or a folder with all that is in it, and why."""

    path: str
    error: InvalidInputError


class ImageFolder:
    """A folder, with those in it."""

    def __init__(self, allowed: Sequence[str], folder: str) -> None:
        """
        Args:
            allowed: folders in which it must be, or be one of them. These may be links.

        Raises:
            InvalidInputError: it is in none of them.
        """
        if not allowed:
            raise InvalidInputError(
                "folders of the server are off here; send the images themselves", field="folder"
            )
        self._path = PurePosixPath(folder)
        for root in allowed:
            inside = self._path.is_relative_to(root) and ".." not in self._path.parts
            if inside and folder.isprintable():
                self._root = root
                return
        raise InvalidInputError(
            f"the folder {folder[:MAX_ID]!r} is not one that this server may read", field="folder"
        )

    def look(
        self, after: str | None, count: int, deadline: float = math.inf
    ) -> tuple[list[ImageFile | Unreadable], str | None]:
        """The image files, and what cannot be read, among the first entries by name, and the path
        of the last entry; None at the end of the folder.

        Links are left out, and files whose path cannot be an id: it is too long, or not printable.

        Args:
            after: the path after which the entries come; None for the first ones. That of a folder
                comes after all that is in it.
            count: most entries, whatever they are.
            deadline: in `time.monotonic` seconds.

        Raises:
            DeadlineExceededError: the folder, with those before the entries, is too large to be
                listed in time.
            InvalidInputError: `after` is not in the folder, or the folder cannot be read.
            NotFoundError: there is no such folder.
        """
        passed: tuple[str, ...] = ()
        if after is not None:
            if not PurePosixPath(after).is_relative_to(self._path):
                raise InvalidInputError("after is not in the folder", field="after")
            passed = PurePosixPath(after).relative_to(self._path).parts
        try:
            folder = self._open(self._path)
            try:
                entries = list(islice(_walk(folder, self._path, passed, count, deadline), count))
            finally:
                os.close(folder)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(
                f"no folder {str(self._path)!r}; links are not followed", field="folder"
            ) from error
        except OSError as error:
            raise _unreadable("folder", error) from error
        found = [item for _, item in entries if item is not None]
        return found, entries[-1][0] if len(entries) == count else None

    def read(self, file: ImageFile, limit: int) -> bytes:
        """A file's content.

        Raises:
            InvalidInputError: it cannot be read, or is not a regular file.
            PayloadTooLargeError: it has more than `limit` bytes.
        """
        path = PurePosixPath(file.path)
        try:
            folder = self._open(path.parent)
            try:
                opened = os.open(path.name, _FILE, dir_fd=folder)
            finally:
                os.close(folder)
            try:
                if not stat.S_ISREG(os.fstat(opened).st_mode):
                    raise InvalidInputError("not a regular file", field="folder")
                with open(opened, "rb", closefd=False) as content:
                    found = content.read(limit + 1)
            finally:
                os.close(opened)
        except OSError as error:
            raise _unreadable("file", error) from error
        if len(found) > limit:
            raise PayloadTooLargeError(f"the file has more than {limit} bytes, which is the limit")
        return found

    def _open(self, path: PurePosixPath) -> int:
        """The descriptor of a folder below the allowed one."""
        opened = os.open(self._root, _FOLDER)
        for part in path.relative_to(self._root).parts:
            try:
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=opened)
            finally:
                os.close(opened)
            opened = inner
        return opened


def _unreadable(what: str, error: OSError) -> InvalidInputError:
    return InvalidInputError(f"the {what} cannot be read: {error.strerror}", field="folder")


def _walk(
    folder: int, path: PurePosixPath, passed: tuple[str, ...], count: int, deadline: float
) -> Iterator[tuple[str, ImageFile | Unreadable | None]]:
    """The paths of the first entries below an open folder, each folder after what is in it. Those
    of image files come with the file, and those of what cannot be read with the error.

    Args:
        passed: the parts of the path, relative to the folder, after which they come.
        count: how many are needed, so that a folder's other entries are not kept.

    Raises:
        OSError: the folder cannot be read.
        DeadlineExceededError: not in time.
    """
    with os.scandir(folder) as listed:
        usable = _usable(listed, path, passed, deadline)
        entries = heapq.nsmallest(count, usable, key=lambda entry: entry.name)
    for entry in entries:
        inner, name = path / entry.name, entry.name
        found: ImageFile | Unreadable | None = None
        try:
            if entry.is_dir(follow_symlinks=False):
                below = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                try:
                    rest = passed[1:] if passed and name == passed[0] else ()
                    yield from _walk(below, inner, rest, count, deadline)
                finally:
                    os.close(below)
            elif inner.suffix.lower() in SUFFIXES and entry.is_file(follow_symlinks=False):
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                found = ImageFile.of(str(inner), status)
        except (FileNotFoundError, NotADirectoryError):
            pass  # it is gone by now
        except OSError as error:
            found = Unreadable(str(inner), _unreadable("entry", error))
        yield str(inner), found


def _usable(
    listed: Iterable[os.DirEntry[str]],
    path: PurePosixPath,
    passed: tuple[str, ...],
    deadline: float,
) -> Iterator[os.DirEntry[str]]:
    """Those of a folder's entries whose path can be an id, and that come after `passed`."""
    for entry in listed:
        if time.monotonic() > deadline:
            raise DeadlineExceededError("the deadline passed while the folder was listed")
        name = entry.name
        if passed and (name < passed[0] or (name,) == passed):
            continue
        if len(str(path / name)) <= MAX_ID and name.isprintable():
            yield entry
