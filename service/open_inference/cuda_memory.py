"""Memory of a CUDA device that another process shares by its handle.

https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__DEVICE.html

Tensors are copied to and from host memory: the rest of the server sees what it sees of any request.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from service.errors import ConflictError, InvalidInputError
from service.open_inference.region import Region, unknown

HANDLE_BYTES = 64  # of a cudaIpcMemHandle_t

T = TypeVar("T")


class Devices(Protocol):
    """This process's CUDA devices. `count`, `open` and `size` raise InvalidInputError with CUDA's
    reason, the others InternalError."""

    def count(self) -> int:
        """How many there are, at least one."""

    def open(self, device: int, handle: bytes) -> int:
        """The address of the memory of a handle."""

    def size(self, device: int, address: int) -> int:
        """The bytes from an address to the end of its allocation."""

    def read(self, device: int, address: int, size: int) -> bytes:
        """Copy bytes to the host."""

    def write(self, device: int, address: int, content: bytes) -> None:
        """Copy bytes to the device."""

    def close(self, device: int, address: int) -> None:
        """Give up an address that `open` returned."""


class CudaThread:
    """The one thread in which CUDA is called, in order: what reads a region comes before what
    closes it."""

    def __init__(self, connect: Callable[[], Devices]) -> None:
        """
        Args:
            connect: called before each use, in the thread.
        """
        self.opened: set[CudaRegion] = set()  # only the thread reads and changes it
        self._connect = connect
        self._pool = ThreadPoolExecutor(1, "cuda-memory")

    async def run(self, work: Callable[[Devices], T]) -> T:
        """What `work` returns. If it is cancelled before it begins, it does not begin."""
        return await asyncio.wrap_future(self.submit(work))

    def submit(self, work: Callable[[Devices], T]) -> "Future[T]":
        """Have work done after all that was submitted before."""
        return self._pool.submit(lambda: work(self._connect()))


@dataclass(slots=True, kw_only=True, eq=False)
class CudaRegion(Region):
    """The beginning of some memory of a device.

    Args:
        handle: a cudaIpcMemHandle_t.
        device_id: the number of the device in this process.
    """

    handle: bytes
    device_id: int
    cuda: CudaThread
    # Where it is in this process; None while it is not open. Only the thread reads and sets it.
    address: int | None = None
    end: int = 0  # of its allocation, which tells whether two regions are of the same

    @property
    def memory(self) -> str:
        return f"the CUDA memory of the handle {self.handle.hex()}"

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("owner", "name", "device_id", "byte_size")}

    async def open(self) -> None:
        try:
            await self.cuda.run(self._open)
        except asyncio.CancelledError:
            self.cuda.submit(self._close)  # the thread may have opened it all the same
            raise

    async def read(self, offset: int, size: int) -> bytes:
        return await self.cuda.run(
            lambda devices: devices.read(self.device_id, self._address_of(offset), size)
        )

    async def write(self, offset: int, content: bytes) -> None:
        await self.cuda.run(
            lambda devices: devices.write(self.device_id, self._address_of(offset), content)
        )

    async def close(self) -> None:
        await self.cuda.run(self._close)

    def _open(self, devices: Devices) -> None:
        if self.device_id >= (count := devices.count()):
            raise InvalidInputError(
                f"there is no CUDA device {self.device_id}; this process has {count}",
                field="device_id",
            )
        address = devices.open(self.device_id, self.handle)
        try:
            size = devices.size(self.device_id, address)
            self.end = address + size
            # Two handles may differ in bytes that CUDA does not read. Addresses are those of one
            # space for all devices.
            others = (each for each in self.cuda.opened if each.owner != self.owner)
            if any(each.end == self.end for each in others):
                raise ConflictError(
                    f"{self.memory} is registered by another API key", field="raw_handle"
                )
            if size < self.byte_size:
                raise InvalidInputError(
                    f"the CUDA memory has {size} bytes, fewer than {self.byte_size}",
                    field="byte_size",
                )
        except BaseException:
            devices.close(self.device_id, address)
            raise
        self.address = address
        self.cuda.opened.add(self)

    def _close(self, devices: Devices) -> None:
        if self.address is not None:
            address, self.address = self.address, None
            self.cuda.opened.discard(self)
            devices.close(self.device_id, address)

    def _address_of(self, offset: int) -> int:
        if self.address is None:
            raise unknown(self.name)
        return self.address + offset
