"""Memory that this process shares with others on the machine."""

import ctypes
from contextlib import AbstractContextManager
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Protocol

HANDLE_BYTES = 64  # of a cudaIpcMemHandle_t


class Shared(Protocol):
    """Some bytes."""

    def write(self, content: bytes, start: int = 0) -> None:
        """Write from `start` on."""

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start` on."""


class SystemMemory(AbstractContextManager["SystemMemory"]):
    """A POSIX shared memory object of a name."""

    def __init__(self, name: str, size: int) -> None:
        self._memory = SharedMemory(name, create=True, size=size)
        assert self._memory.buf is not None
        self._content = self._memory.buf

    def write(self, content: bytes, start: int = 0) -> None:
        self._content[start : start + len(content)] = content

    def read(self, start: int, size: int) -> bytes:
        return bytes(self._content[start : start + size])

    def __exit__(self, *_: object) -> None:
        self._content.release()
        self._memory.close()
        self._memory.unlink()


class DeviceMemory(AbstractContextManager["DeviceMemory"]):
    """An allocation on a CUDA device.

    Attributes:
        handle: by which another process opens it.
    """

    def __init__(self, device: int, size: int) -> None:
        from cuda.bindings import runtime

        self._runtime: Any = runtime
        self._checked(runtime.cudaSetDevice(device))
        self._address: int = self._checked(runtime.cudaMalloc(size))
        made = self._checked(runtime.cudaIpcGetMemHandle(self._address))
        self.handle = ctypes.string_at(made.getPtr(), HANDLE_BYTES)

    def write(self, content: bytes, start: int = 0) -> None:
        source = ctypes.cast(ctypes.c_char_p(content), ctypes.c_void_p).value
        self._copy(self._address + start, source, len(content))
        # The copy may return before the device has it, and another process reads it.
        self._checked(self._runtime.cudaStreamSynchronize(0))

    def read(self, start: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        self._copy(ctypes.addressof(buffer), self._address + start, size)
        return buffer.raw

    def __exit__(self, *_: object) -> None:
        self._checked(self._runtime.cudaFree(self._address))

    def _copy(self, target: int, source: int | None, size: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._checked(self._runtime.cudaMemcpy(target, source, size, kind))

    def _checked(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error:
            raise RuntimeError(f"CUDA: {error.name}")
        return values[0] if values else None
