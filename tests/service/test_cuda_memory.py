"""CUDA shared memory, with a stand-in for the devices. `benchmarks.gpu` has the part
`shared-memory`, with real ones; `test_triton.py` asks a server."""

import asyncio
import ctypes
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.errors import (
    ConflictError,
    InternalError,
    InvalidInputError,
    NotFoundError,
    PayloadTooLargeError,
)
from service.open_inference.cuda import Cuda
from service.open_inference.cuda_memory import CudaRegion
from service.open_inference.shared_memory import OwnedMemory, Place, SharedMemory
from tests.conftest import wait_until
from tests.service.cuda_stand_in import StandIn
from tests.service.test_triton import api_key

PREFIX = "vitrail_"


@pytest.fixture
def devices() -> StandIn:
    return StandIn()


@pytest.fixture
def memory(devices: StandIn) -> OwnedMemory:
    return SharedMemory(PREFIX, lambda: devices).of(None)


def test_bytes_are_copied_to_and_from_their_place(devices: StandIn, memory: OwnedMemory) -> None:
    handle, held = devices.allocate(128)
    held[:] = bytes(range(128))

    async def run() -> None:
        await memory.register_cuda("a", handle, 1, 100)
        assert await memory.read(Place("a", 4, 10), 64) == bytes(range(10, 14))
        await memory.write(Place("a", 8, 20), b"here")
        assert held[19:25] == bytes([19, *b"here", 24])
        for place in (Place("a", 8, 93), Place("a", 101)):  # inside the allocation alone
            with pytest.raises(InvalidInputError, match="not inside"):
                await memory.read(place, 1024)
            with pytest.raises(InvalidInputError, match="not inside"):
                await memory.write(place, b"x")
        with pytest.raises(InvalidInputError, match="output has 5 bytes"):
            await memory.write(Place("a", 4), b"12345")
        with pytest.raises(PayloadTooLargeError):
            await memory.read(Place("a", 100), 99)

    asyncio.run(run())
    assert devices.calls == ["open", "read", "write"]


@pytest.mark.parametrize(
    ("handle_bytes", "device_id", "byte_size", "detail"),
    [
        (64, 0, 129, "128 bytes, fewer than 129"),
        (64, 2, 128, "no CUDA device 2; this process has 2"),
        (64, -1, 128, "not negative"),
        (63, 0, 128, "63 bytes, not 64"),
        (64, 0, 0, "at least one byte"),
    ],
)
def test_what_cannot_be_opened_is_refused_and_closed(
    devices: StandIn,
    memory: OwnedMemory,
    handle_bytes: int,
    device_id: int,
    byte_size: int,
    detail: str,
) -> None:
    handle, _ = devices.allocate(128)
    with pytest.raises(InvalidInputError, match=detail):
        asyncio.run(memory.register_cuda("a", handle[:handle_bytes], device_id, byte_size))
    with pytest.raises(InvalidInputError, match="cudaIpcOpenMemHandle"):
        asyncio.run(memory.register_cuda("a", bytes([9]) * 64, 0, 64))
    assert memory.status(CudaRegion) == []
    assert not devices.opened
    asyncio.run(memory.register_cuda("a", handle, 0, 128))  # the name is free


def test_it_is_off_unless_the_setting_says_otherwise(devices: StandIn) -> None:
    handle, _ = devices.allocate(128)
    with pytest.raises(InvalidInputError, match="turned off"):
        asyncio.run(SharedMemory("", lambda: devices).of(None).register_cuda("a", handle, 0, 64))
    assert devices.calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_a_device_says_why() -> None:
    with pytest.raises(InvalidInputError, match="CUDA shared memory"):
        asyncio.run(SharedMemory(PREFIX).of(None).register_cuda("a", bytes(64), 0, 64))


def test_a_region_is_closed_after_what_reads_it(devices: StandIn, memory: OwnedMemory) -> None:
    handle, _ = devices.allocate(128)
    gate = devices.gates["read"] = threading.Event()

    async def run() -> None:
        await memory.register_cuda("a", handle, 0, 128)
        reading = asyncio.create_task(memory.read(Place("a", 64), 64))
        await asyncio.to_thread(wait_until, lambda: devices.calls == ["open", "read"])
        unregistering = asyncio.create_task(memory.unregister(CudaRegion, "a"))
        await asyncio.sleep(0.1)
        assert not unregistering.done()
        with pytest.raises(NotFoundError):
            await memory.read(Place("a", 64), 64)
        unregistering.cancel()  # it is closed all the same
        gate.set()
        assert await reading == bytes(64)
        await asyncio.to_thread(wait_until, lambda: devices.calls == ["open", "read", "close"])

    asyncio.run(run())
    assert not devices.opened


def test_a_registration_that_is_cancelled_leaves_nothing_open(
    devices: StandIn, memory: OwnedMemory
) -> None:
    handle, _ = devices.allocate(128)
    gate = devices.gates["open"] = threading.Event()

    async def run() -> None:
        registering = asyncio.create_task(memory.register_cuda("a", handle, 0, 128))
        await asyncio.to_thread(wait_until, lambda: devices.calls == ["open"])
        with pytest.raises(ConflictError):  # its name is taken while it is being opened
            await memory.register_cuda("a", handle, 0, 128)
        registering.cancel()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await registering

    asyncio.run(run())
    wait_until(lambda: devices.calls == ["open", "close"])
    assert memory.status(CudaRegion) == []


def test_a_handles_memory_is_its_owners_alone(devices: StandIn) -> None:
    handle, _ = devices.allocate(128)
    memory = SharedMemory(PREFIX, lambda: devices)
    own, other = (memory.of(api_key(name)) for name in ("own", "other"))
    admin = memory.of(api_key("root", "admin"))

    async def run() -> None:
        await own.register_cuda("a", handle, 0, 64)
        # the second is other bytes of which CUDA makes the same memory
        for named in (handle, handle[:-1] + b"\0"):
            with pytest.raises(ConflictError, match="another API key"):
                await other.register_cuda("b", named, 0, 64)
        with pytest.raises(NotFoundError):
            await other.read(Place("a", 64), 64)
        await other.unregister(CudaRegion, "a")
        assert [region.name for region in own.status(CudaRegion)] == ["a"]
        await admin.unregister(CudaRegion, "a")
        await other.register_cuda("b", handle, 0, 64)
        await other.register_cuda("c", handle[:-1] + b"\0", 0, 64)  # twice its own

    asyncio.run(run())
    assert devices.calls == ["open", "open", "close", "close", "open", "open"]


class Runtime:
    """A stand-in for the bindings of CUDA's runtime, one of whose calls may fail."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDeviceToHost=2, cudaMemcpyHostToDevice=1)
    cudaIpcMemLazyEnablePeerAccess = 1

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        self.calls: list[str] = []

    def cudaIpcMemHandle_t(self) -> Any:
        self.handle = bytearray(64)
        return SimpleNamespace(getPtr=lambda: (ctypes.c_char * 64).from_buffer(self.handle))

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, b"a reason"

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> tuple[int, int]:
            self.calls.append(name)
            return int(name == self.failing), 1

        return call


def cuda_with(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    bindings = SimpleNamespace(driver=None, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    return Cuda()


def test_a_write_has_arrived_when_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    cuda_with(runtime, monkeypatch).write(0, 1, b"content")
    assert runtime.calls == ["cudaSetDevice", "cudaMemcpy", "cudaStreamSynchronize"]


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        ("cudaGetDeviceCount", InvalidInputError),
        ("cudaIpcOpenMemHandle", InvalidInputError),
        ("cudaMemcpy", InternalError),
        ("cudaStreamSynchronize", InternalError),
        ("cudaIpcCloseMemHandle", InternalError),
    ],
)
def test_only_what_a_client_names_is_its_error(
    failing: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = cuda_with(Runtime(failing), monkeypatch)

    def use() -> None:
        cuda.count()
        cuda.open(0, bytes(64))
        cuda.write(0, 1, b"content")
        cuda.close(0, 1)

    with pytest.raises(error, match="CUDA shared memory"):
        use()
