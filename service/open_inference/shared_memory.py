"""Triton's shared memory extensions: tensors in memory of this machine or of its CUDA devices.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_shared_memory.md

A region belongs to the API key that registered it. Other keys can neither use, list nor unregister
it, and cannot register its memory. Without keys all callers are one owner.

Memory itself belongs to nobody until it is registered: the system does not know of API keys. Whose
it is can be told by its name alone, so `PREFIX` + the id of an API key + `:` + anything can be
registered with that key only, where keys are used. Other names are had by the first who registers
them. CUDA's memory has no name: it is had by the first who registers a handle of it.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from service.errors import (
    ConflictError,
    InvalidInputError,
    PayloadTooLargeError,
    PermissionDeniedError,
)
from service.keys import ApiKey
from service.open_inference.cuda import Cuda
from service.open_inference.cuda_memory import HANDLE_BYTES, CudaRegion, CudaThread, Devices
from service.open_inference.region import Region, unknown
from service.open_inference.system_memory import SystemRegion

MAX_REGIONS = 1024
# Of one owner.
MAX_OWN_REGIONS = 128
MAX_OWN_BYTES = 4 * 2**30
MAX_NAME = 256  # characters

R = TypeVar("R", bound=Region)


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

    def __init__(self, prefix: str, cuda: Callable[[], Devices] = Cuda) -> None:
        """
        Args:
            prefix: what the keys that clients may register begin with; if empty, they may register
                nothing, CUDA's memory included.
            cuda: connects to this process's CUDA devices.
        """
        self.prefix = prefix.removeprefix("/")
        self.cuda = CudaThread(cuda)
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

    async def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Register a region of system shared memory.

        Raises:
            ServiceError: not allowed, too many regions or bytes, the name is taken, the memory is
                another owner's, or there is no such memory.
        """
        self._check_is_on()
        plain, prefix = key.removeprefix("/"), self._memory.prefix
        if not plain.startswith(prefix) or "/" in plain or "\0" in plain:
            raise InvalidInputError(f"the key {key!r} does not begin with {prefix!r}", field="key")
        owner, colon, _ = plain.removeprefix(prefix).partition(":")
        if colon and self._owner and owner != self._owner:
            raise PermissionDeniedError(f"the key {key!r} is for the API key with the id {owner!r}")
        if offset < 0:
            raise InvalidInputError("an offset is not negative", field="offset")
        await self._add(
            SystemRegion(
                owner=self._owner, name=name, byte_size=byte_size, key=plain, offset=offset
            )
        )

    async def register_cuda(self, name: str, handle: bytes, device_id: int, byte_size: int) -> None:
        """Register a region of CUDA shared memory.

        Args:
            handle: a cudaIpcMemHandle_t.

        Raises:
            ServiceError: as `register`, or CUDA cannot open the handle.
        """
        self._check_is_on()
        if len(handle) != HANDLE_BYTES:
            raise InvalidInputError(
                f"the raw handle has {len(handle)} bytes, not {HANDLE_BYTES}", field="raw_handle"
            )
        if device_id < 0:
            raise InvalidInputError("a device_id is not negative", field="device_id")
        await self._add(
            CudaRegion(
                owner=self._owner, name=name, byte_size=byte_size, handle=handle,
                device_id=device_id, cuda=self._memory.cuda,
            )
        )  # fmt: skip

    async def unregister(self, kind: type[Region], name: str = "") -> None:
        """Forget a region, or all of the owner's of a kind. An admin's key also names those of
        others. What reads or writes one now is waited for."""
        regions = self._find(kind, name) if name else self._own(kind)
        for region in regions:
            del self._memory.regions[region.owner, region.name]
        await asyncio.shield(asyncio.gather(*(region.close() for region in regions)))

    def status(self, kind: type[R], name: str = "") -> list[R]:
        """The owner's regions of a kind, or those of that name. An admin's key sees those of
        others, too.

        Raises:
            NotFoundError: no region has that name.
        """
        if not name:
            return self._all(kind) if self._is_admin else self._own(kind)
        if not (found := self._find(kind, name)):
            raise unknown(name)
        return found

    async def read(self, place: Place, limit: int) -> bytes:
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
        return await region.read(place.offset, place.byte_size)

    async def write(self, place: Place, content: bytes) -> None:
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
        await region.write(place.offset, content)

    def _get(self, name: str) -> Region:
        if (region := self._memory.regions.get((self._owner, name))) is None:
            raise unknown(name)
        return region

    def _all(self, kind: type[R]) -> list[R]:
        return [each for each in self._memory.regions.values() if isinstance(each, kind)]

    def _own(self, kind: type[R]) -> list[R]:
        return [each for each in self._all(kind) if each.owner == self._owner]

    def _find(self, kind: type[R], name: str) -> list[R]:
        """The owner's region of that name. If there is none, an admin's key finds others'."""
        named = [region for region in self._all(kind) if region.name == name]
        own = [region for region in named if region.owner == self._owner]
        return own or (named if self._is_admin else [])

    async def _add(self, region: Region) -> None:
        """
        Raises:
            ServiceError: the region cannot be added, or its memory cannot be opened.
        """
        if not 0 < len(region.name) <= MAX_NAME or region.byte_size < 1:
            raise InvalidInputError(
                f"a region has a name of up to {MAX_NAME} characters and at least one byte",
                field="byte_size",
            )
        self._check_room(region)
        regions, place = self._memory.regions, (region.owner, region.name)
        regions[place] = region  # before it is open, so that nobody else takes its name
        try:
            await region.open()
        except BaseException:
            if regions.get(place) is region:
                del regions[place]
            raise

    def _check_is_on(self) -> None:
        if not self._memory.prefix:
            raise InvalidInputError(
                "shared memory is turned off; VITRAIL_SHARED_MEMORY turns it on"
            )

    def _check_room(self, new: Region) -> None:
        """
        Raises:
            ConflictError, PayloadTooLargeError: the region cannot be added to those that exist.
        """
        regions = self._memory.regions
        if (self._owner, new.name) in regions:
            raise ConflictError(f"a region {new.name!r} is registered", field="name")
        others = (each for each in regions.values() if each.owner != self._owner)
        if any(each.memory == new.memory for each in others):
            raise ConflictError(f"{new.memory} is registered by another API key", field="key")
        own = [each for each in regions.values() if each.owner == self._owner]
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


def _check_inside(region: Region, offset: int, size: int) -> None:
    if offset + size > region.byte_size:
        raise InvalidInputError(
            f"{size} bytes from {offset} are not inside the region {region.name!r}, which has "
            f"{region.byte_size}",
            field="shared_memory_byte_size",
        )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48
