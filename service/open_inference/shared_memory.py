"""Triton's system shared memory extension: tensors in POSIX shared memory of this machine.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_shared_memory.md

Regions are read and written as files, not mapped: a client that shortens one gets an error, where a
mapping would end the process.

A region belongs to the API key that registered it. Other keys can neither use, list nor unregister
it, and cannot register its memory. Without keys all callers are one owner.

Memory itself belongs to nobody until it is registered: the system does not know of API keys. Whose
it is can be told by its name alone, so `PREFIX` + the id of an API key + `:` + anything can be
registered with that key only, where keys are used. Other names are had by the first who registers
them.
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
)
from service.keys import ApiKey

FOLDER = Path("/dev/shm")  # nosec B108: where the system keeps shared memory
MAX_REGIONS = 1024
# Of one owner.
MAX_OWN_REGIONS = 128
MAX_OWN_BYTES = 4 * 2**30
MAX_NAME = 256  # characters
CUDA = "CUDA shared memory is not supported; use system shared memory, or send the tensors"


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a shared memory object, as a client registered it.

    Args:
        owner: the id of an API key; empty for callers without one.
    """

    owner: str
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
        self.prefix = prefix.removeprefix("/")
        self.regions: dict[tuple[str, str], Region] = {}  # by owner and name

    def of(self, key: ApiKey | None) -> "OwnedMemory":
        """The regions as the owner of an API key sees them; None for callers without one."""
        return OwnedMemory(self, key)


class OwnedMemory:
    """One owner's regions."""

    def __init__(self, memory: SharedMemory, key: ApiKey | None) -> None:
        self._memory = memory
        self._owner = "" if key is None else key.id
        self._is_admin = key is not None and key.permits("admin")

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a region.

        Raises:
            ServiceError: not allowed, too many regions or bytes, the name is taken, the memory is
                another owner's, or there is no such memory.
        """
        memory = self._memory
        if not memory.prefix:
            raise InvalidInputError(
                "shared memory is turned off; VITRAIL_SHARED_MEMORY says which keys clients may use"
            )
        plain = key.removeprefix("/")
        if not plain.startswith(memory.prefix) or "/" in plain or "\0" in plain:
            raise InvalidInputError(
                f"the key {key!r} does not begin with {memory.prefix!r}", field="key"
            )
        owner, colon, _ = plain.removeprefix(memory.prefix).partition(":")
        if colon and self._owner and owner != self._owner:
            raise PermissionDeniedError(f"the key {key!r} is for the API key with the id {owner!r}")
        if not 0 < len(name) <= MAX_NAME or offset < 0 or byte_size < 1:
            raise InvalidInputError(
                f"a region has a name of up to {MAX_NAME} characters, an offset and a size",
                field="byte_size",
            )
        region = Region(self._owner, name, plain, offset, byte_size)
        self._check_room(region)
        descriptor = _open(region, os.O_RDWR)
        try:
            _check_end(descriptor, region, offset + byte_size)
        finally:
            os.close(descriptor)
        memory.regions[self._owner, name] = region

    def unregister(self, name: str = "") -> None:
        """Forget a region, or all of the owner's. An admin's key also names those of others."""
        for region in self._find(name) if name else self._own():
            del self._memory.regions[region.owner, region.name]

    def status(self, name: str = "") -> list[Region]:
        """The owner's regions, or those of that name. An admin's key sees those of others, too.

        Raises:
            NotFoundError: no region has that name.
        """
        if not name:
            return list(self._memory.regions.values()) if self._is_admin else self._own()
        if not (found := self._find(name)):
            raise _unknown(name)
        return found

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
        if (region := self._memory.regions.get((self._owner, name))) is None:
            raise _unknown(name)
        return region

    def _own(self) -> list[Region]:
        return [each for each in self._memory.regions.values() if each.owner == self._owner]

    def _find(self, name: str) -> list[Region]:
        """The owner's region of that name. If there is none, an admin's key finds others'."""
        named = [region for region in self._memory.regions.values() if region.name == name]
        own = [region for region in named if region.owner == self._owner]
        return own or (named if self._is_admin else [])

    def _check_room(self, new: Region) -> None:
        """
        Raises:
            ConflictError, PayloadTooLargeError: the region cannot be added to those that exist.
        """
        regions = self._memory.regions
        if (self._owner, new.name) in regions:
            raise ConflictError(f"a region {new.name!r} is registered", field="name")
        if any(each.key == new.key and each.owner != self._owner for each in regions.values()):
            raise ConflictError(
                f"the shared memory {new.key!r} is registered by another API key", field="key"
            )
        own = self._own()
        if len(own) >= MAX_OWN_REGIONS or len(regions) >= MAX_REGIONS:
            raise PayloadTooLargeError(
                f"{len(own)} regions are registered with this API key and {len(regions)} "
                f"altogether; the limits are {MAX_OWN_REGIONS} and {MAX_REGIONS}. Unregister some"
            )
        if (size := new.byte_size + sum(each.byte_size for each in own)) > MAX_OWN_BYTES:
            raise PayloadTooLargeError(
                f"the regions of this API key would have {size} bytes; the limit is "
                f"{MAX_OWN_BYTES}. Unregister some"
            )


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(f"no shared memory region {name!r} is registered", field="name")


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
