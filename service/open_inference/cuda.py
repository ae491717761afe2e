"""CUDA's calls for memory that processes share, through NVIDIA's own bindings.

torch for CUDA needs the same package: https://nvidia.github.io/cuda-python/cuda-bindings/
"""

import ctypes
import logging
from typing import Any

import numpy as np

from service.errors import InternalError, InvalidInputError
from service.open_inference.cuda_memory import HANDLE_BYTES

logger = logging.getLogger(__name__)


class Cuda:
    """The devices that this process sees. Implements `Devices`."""

    def __init__(self) -> None:
        """
        Raises:
            InvalidInputError: the bindings are not installed.
        """
        try:
            from cuda.bindings import driver, runtime
        except ImportError as error:
            raise InvalidInputError(
                "CUDA shared memory needs the package cuda-bindings, which torch for CUDA brings"
            ) from error
        self._driver: Any = driver
        self._runtime: Any = runtime

    def count(self) -> int:
        count: int = self._checked("cudaGetDeviceCount", blames_client=True)
        return count

    def open(self, device: int, handle: bytes) -> int:
        self._checked("cudaSetDevice", device)
        made = self._runtime.cudaIpcMemHandle_t()
        ctypes.memmove(made.getPtr(), handle, HANDLE_BYTES)
        flags = self._runtime.cudaIpcMemLazyEnablePeerAccess
        address: int = self._checked("cudaIpcOpenMemHandle", made, flags, blames_client=True)
        return address

    def size(self, device: int, address: int) -> int:
        self._checked("cudaSetDevice", device)
        error, base, size = self._driver.cuMemGetAddressRange(address)
        if error:
            raise InvalidInputError(f"CUDA shared memory: cuMemGetAddressRange: {error.name}")
        end: int = int(base) + size
        return end - address

    def read(self, device: int, address: int, size: int) -> bytes:
        content = np.empty(size, np.uint8)
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._checked("cudaSetDevice", device)
        self._checked("cudaMemcpy", content.ctypes.data, address, size, kind)
        return content.tobytes()

    def write(self, device: int, address: int, content: bytes) -> None:
        source = ctypes.cast(ctypes.c_char_p(content), ctypes.c_void_p).value
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._checked("cudaSetDevice", device)
        self._checked("cudaMemcpy", address, source, len(content), kind)
        # From pageable memory the copy returns when it is staged, before the device has it. Another
        # process reads it, which no stream of this one orders.
        self._checked("cudaStreamSynchronize", 0)

    def close(self, device: int, address: int) -> None:
        self._checked("cudaSetDevice", device)
        self._checked("cudaIpcCloseMemHandle", address)

    def _checked(self, name: str, *arguments: Any, blames_client: bool = False) -> Any:
        """What a call of the runtime returns.

        Raises:
            InvalidInputError: the call failed, and does so because of what the client named.
            InternalError: another call failed.
        """
        error, *values = getattr(self._runtime, name)(*arguments)
        if error:
            _, text = self._runtime.cudaGetErrorString(error)
            reason = f"CUDA shared memory: {name}: {text.decode()}"
            if blames_client:
                raise InvalidInputError(reason)
            logger.error(reason)
            raise InternalError("CUDA shared memory could not be used")
        return values[0] if values else None
