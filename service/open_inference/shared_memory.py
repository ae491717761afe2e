"""Triton's system shared memory extension: tensors in POSIX shared memory of this machine.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_shared_memory.md

Regions are read and written as files, not mapped: a client that shortens one gets an error, where a
mapping would end the process.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.errors import ConflictError, InvalidInputError, NotFoundError, PayloadTooLargeError

FOLDER = Path("/dev/shm")  # nosec B108: where the system keeps shared memory
MAX_REGIONS = 1024
MAX_NAME = 256  # characters
CUDA = "CUDA shared memory is not supported; use system shared memory, or send the tensors"


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a shared memory object, as a client registered it."""

    name: str
    key: str
    offset: int
    byte_size: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is: bytes of a registered region."""

    region: str
    byte_size: int
    offset: int = 0


def place_of(parameters: Mapping[str, Any]) -> Place | None:
    """The place that an input's or output's parameters name; None if they name none.

    Raises:
        InvalidInputError: without a size, or not text and numbers.
    """
    if (region := parameters.get("shared_memory_region")) is None:
        return None
    size = parameters.get("shared_memory_byte_size")
    offset = parameters.get("shared_memory_offset", 0)
    if not isinstance(region, str) or not _is_size(size) or not _is_size(offset):
        raise InvalidInputError(
            "shared_memory_region is text, shared_memory_byte_size and shared_memory_offset are "
            "numbers of bytes",
            field="shared_memory_region",
        )
    return Place(region, int(size or 0), offset)


class SharedMemory:
    """The regions that clients have registered with this process."""

    def __init__(self, prefix: str) -> None:
        """
        Args:
            prefix: what the keys that clients may register begin with; if empty, they may none.
        """
        self._prefix = prefix.removeprefix("/")
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a region.

        Raises:
            ServiceError: not allowed, too many, the name is taken, or there is no such memory.
        """
        if not self._prefix:
            raise InvalidInputError(
                "shared memory is turned off; VITRAIL_SHARED_MEMORY says which keys clients may use"
            )
        plain = key.removeprefix("/")
        if not plain.startswith(self._prefix) or "/" in plain or "\0" in plain:
            raise InvalidInputError(
                f"the key {key!r} does not begin with {self._prefix!r}", field="key"
            )
        if name in self._regions:
            raise ConflictError(f"a region {name!r} is registered", field="name")
        if len(self._regions) >= MAX_REGIONS:
            raise PayloadTooLargeError(f"{MAX_REGIONS} regions are registered; unregister some")
        if not 0 < len(name) <= MAX_NAME or offset < 0 or byte_size < 1:
            raise InvalidInputError(
                f"a region has a name of up to {MAX_NAME} characters, an offset and a size",
                field="byte_size",
            )
        region = Region(name, plain, offset, byte_size)
        descriptor = _open(region, os.O_RDWR)
        try:
            _check_end(descriptor, region, offset + byte_size)
        finally:
            os.close(descriptor)
        self._regions[name] = region

    def unregister(self, name: str = "") -> None:
        """Forget a region, or all of them."""
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def status(self, name: str = "") -> list[dict[str, Any]]:
        """Every region, or one.

        Raises:
            NotFoundError: no region has that name.
        """
        regions = [self._get(name)] if name else list(self._regions.values())
        return [asdict(region) for region in regions]

    def read(self, place: Place, limit: int) -> bytes:
        """The bytes at a place.

        Args:
            limit: the most bytes.

        Raises:
            ServiceError: no such region, or it does not hold so many bytes.
        """
        region = self._get(place.region)
        _check_inside(region, place.offset, place.byte_size)
        if place.byte_size > limit:
            raise PayloadTooLargeError(f"the tensor has {place.byte_size} bytes; limit {limit}")
        descriptor = _open(region, os.O_RDONLY)
        try:
            start = region.offset + place.offset
            _check_end(descriptor, region, start + place.byte_size)
            content = os.pread(descriptor, place.byte_size, start)
        finally:
            os.close(descriptor)
        if len(content) != place.byte_size:
            raise InvalidInputError(f"the region {region.name!r} was shortened")
        return content

    def write(self, place: Place, content: bytes) -> None:
        """Write a tensor to its place.

        Raises:
            ServiceError: no such region, or the place is too small.
        """
        region = self._get(place.region)
        _check_inside(region, place.offset, place.byte_size)
        if len(content) > place.byte_size:
            raise InvalidInputError(
                f"the output has {len(content)} bytes; its shared memory has {place.byte_size}",
                field="outputs",
            )
        descriptor = _open(region, os.O_RDWR)
        try:
            start = region.offset + place.offset
            _check_end(descriptor, region, start + len(content))  # writing would extend it
            written = os.pwrite(descriptor, content, start)
        except OSError as error:
            raise InvalidInputError(
                f"the region {region.name!r} cannot be written: {error.strerror}"
            ) from error
        finally:
            os.close(descriptor)
        if written != len(content):
            raise InvalidInputError(f"the region {region.name!r} has no memory for the output")

    def _get(self, name: str) -> Region:
        if name not in self._regions:
            raise NotFoundError(f"no shared memory region {name!r} is registered", field="name")
        return self._regions[name]


def _open(region: Region, flags: int) -> int:
    try:
        descriptor = os.open(FOLDER / region.key, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidInputError(
            f"the shared memory {region.key!r} cannot be opened: {error.strerror}", field="key"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidInputError(f"{region.key!r} is not shared memory", field="key")
    return descriptor


def _check_inside(region: Region, offset: int, size: int) -> None:
    if offset + size > region.byte_size:
        raise InvalidInputError(
            f"{size} bytes from {offset} are not inside the region {region.name!r}, which has "
            f"{region.byte_size}",
            field="shared_memory_byte_size",
        )


def _check_end(descriptor: int, region: Region, end: int) -> None:
    if (size := os.fstat(descriptor).st_size) < end:
        raise InvalidInputError(
            f"the shared memory {region.key!r} has {size} bytes, fewer than {end}",
            field="byte_size",
        )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48
