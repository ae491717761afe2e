"""A stand-in for CUDA devices whose memory processes share."""

import threading
from collections import Counter
from dataclasses import dataclass, field

from service.errors import InvalidInputError
from service.open_inference.cuda_memory import HANDLE_BYTES

SPACING = 2**32  # between allocations' addresses


@dataclass
class StandIn:
    """Two devices, whose memory is of this process. Implements `Devices`.

    Attributes:
        allocations: of other processes. The bytes of a handle are its number, from 1 on.
        calls: what was done, in order.
        gates: by call, what it waits for.
        opened: how often each address is open.
    """

    allocations: list[bytearray] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    gates: dict[str, threading.Event] = field(default_factory=dict)
    opened: Counter[int] = field(default_factory=Counter)

    def allocate(self, size: int) -> tuple[bytes, bytearray]:
        """Memory as another process makes it: its handle, and its bytes."""
        self.allocations.append(bytearray(size))
        return bytes([len(self.allocations)]) * HANDLE_BYTES, self.allocations[-1]

    def count(self) -> int:
        return 2

    def open(self, device: int, handle: bytes) -> int:
        self._call("open")
        if not 0 < handle[0] <= len(self.allocations):
            raise InvalidInputError("CUDA shared memory: cudaIpcOpenMemHandle: invalid argument")
        self.opened[handle[0] * SPACING] += 1
        return handle[0] * SPACING

    def size(self, device: int, address: int) -> int:
        return len(self._memory(address)) - address % SPACING

    def read(self, device: int, address: int, size: int) -> bytes:
        self._call("read")
        start = address % SPACING
        return bytes(self._memory(address)[start : start + size])

    def write(self, device: int, address: int, content: bytes) -> None:
        self._call("write")
        start = address % SPACING
        self._memory(address)[start : start + len(content)] = content

    def close(self, device: int, address: int) -> None:
        self._call("close")
        self.opened -= Counter([address])  # without those that are no longer open

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.gates:
            assert self.gates[name].wait(20)

    def _memory(self, address: int) -> bytearray:
        assert address // SPACING * SPACING in self.opened
        return self.allocations[address // SPACING - 1]
