"""POSIX shared memory of this machine.

It is read and written as files, not mapped: a client that shortens it gets an error, where a
mapping would end the process.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import InvalidInputError
from service.open_inference.region import Region

FOLDER = Path("/dev/shm")  # nosec B108: where the system keeps shared memory


@dataclass(slots=True, kw_only=True, eq=False)
class SystemRegion(Region):
    """A part of a shared memory object.

    Args:
        key: the object's name, without a leading slash.
    """

    key: str
    offset: int

    @property
    def memory(self) -> str:
        return f"the shared memory {self.key!r}"

    def to_json(self) -> dict[str, Any]:
        names = ("owner", "name", "key", "offset", "byte_size")
        return {name: getattr(self, name) for name in names}

    async def open(self) -> None:
        with self._opened(os.O_RDWR) as descriptor:
            self._check_end(descriptor, self.offset + self.byte_size)

    async def read(self, offset: int, size: int) -> bytes:
        start = self.offset + offset
        with self._opened(os.O_RDONLY) as descriptor:
            self._check_end(descriptor, start + size)
            content = os.pread(descriptor, size, start)
        if len(content) != size:
            raise InvalidInputError(f"the region {self.name!r} was shortened")
        return content

    async def write(self, offset: int, content: bytes) -> None:
        start = self.offset + offset
        with self._opened(os.O_RDWR) as descriptor:
            self._check_end(descriptor, start + len(content))  # writing would extend it
            try:
                written = os.pwrite(descriptor, content, start)
            except OSError as error:
                raise InvalidInputError(
                    f"the region {self.name!r} cannot be written: {error.strerror}"
                ) from error
        if written != len(content):
            raise InvalidInputError(f"the region {self.name!r} has no memory for the output")

    async def close(self) -> None:
        """It is open only while it is read or written."""

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        """The object's file descriptor."""
        try:
            descriptor = os.open(FOLDER / self.key, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise InvalidInputError(
                f"{self.memory} cannot be opened: {error.strerror}", field="key"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InvalidInputError(f"{self.key!r} is not shared memory", field="key")
            yield descriptor
        finally:
            os.close(descriptor)

    def _check_end(self, descriptor: int, end: int) -> None:
        if (size := os.fstat(descriptor).st_size) < end:
            raise InvalidInputError(
                f"{self.memory} has {size} bytes, fewer than {end}", field="byte_size"
            )
