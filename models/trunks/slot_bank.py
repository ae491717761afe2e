"""Tensors of one size from many heads, side by side in one tensor that grows.

Kernels find a head's by integer slots, so a new head changes tensors' contents and no computation.
"""

import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from models.trunks.transfers import finish_writes

FIRST_CAPACITY = 64


class Slots:
    """Consecutive places in a bank, which has them back when this object is garbage-collected.

    Args:
        nbytes: bytes of what is in them.
    """

    def __init__(self, places: range, nbytes: int) -> None:
        self.places = places
        self.nbytes = nbytes


class SlotBank:
    """Its capacity doubles when it is used up. Methods may be called from any thread.

    Attributes:
        tensors: None before the first `store`.
    """

    def __init__(self, dimension: int = 0) -> None:
        """
        Args:
            dimension: that of the slots, in all tensors.
        """
        self._dimension = dimension
        self._lock = threading.Lock()
        self._free: list[range] = []
        # The garbage collector may run in a thread that holds the lock, so it only appends here.
        self._released: deque[range] = deque()
        self.tensors: tuple[Tensor, ...] | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def store(self, *parts: Tensor) -> Slots:
        """Store tensors of equally many slots, of the same sizes otherwise in each call, until the
        returned object is garbage-collected."""
        count = parts[0].shape[self._dimension]
        with self._lock:
            places = self._take(count, parts)
            assert self.tensors is not None
            for bank, part in zip(self.tensors, parts, strict=True):
                bank.narrow(self._dimension, places.start, count).copy_(part)
        finish_writes(parts[0].device)
        slots = Slots(places, sum(part.nbytes for part in parts))
        weakref.finalize(slots, self._released.append, places).atexit = False
        return slots

    def for_pass(self) -> tuple[Tensor, ...]:
        """The tensors, for kernels that the caller starts next on its CUDA stream: the bank may
        grow and free them before these have ended."""
        assert self.tensors is not None
        tensors = self.tensors
        if tensors[0].is_cuda:
            stream = torch.cuda.current_stream(tensors[0].device)
            for tensor in tensors:
                tensor.record_stream(stream)
        return tensors

    @property
    def spare_bytes(self) -> int:
        """Bytes of the places that are free."""
        with self._lock:
            self._take_back()
            if self.tensors is None:
                return 0
            capacity = self.tensors[0].shape[self._dimension]
            return sum(map(len, self._free)) * sum(t.nbytes for t in self.tensors) // capacity

    def _take_back(self) -> None:
        """Make the places free that nothing holds any more."""
        while self._released:
            self._free.append(self._released.popleft())
        self._free = _joined(self._free)

    def _take(self, count: int, parts: Sequence[Tensor]) -> range:
        self._take_back()
        while True:
            for position, free in enumerate(self._free):
                if len(free) >= count:
                    self._free[position] = free[count:]
                    return free[:count]
            self._grow(count, parts)

    def _grow(self, count: int, parts: Sequence[Tensor]) -> None:
        """Replace the tensors by larger ones. Passes in flight keep the old ones."""
        old = 0 if self.tensors is None else self.tensors[0].shape[self._dimension]
        new = max(FIRST_CAPACITY, 2 * old, old + count)
        larger = []
        for number, part in enumerate(parts):
            shape = list(part.shape)
            shape[self._dimension] = new
            larger.append(part.new_zeros(shape))
            if self.tensors is not None:
                larger[-1].narrow(self._dimension, 0, old).copy_(self.tensors[number])
        if self.tensors is not None:
            finish_writes(parts[0].device)
        self.tensors = tuple(larger)
        self._free = _joined([*self._free, range(old, new)])


def _joined(ranges: Sequence[range]) -> list[range]:
    """Ranges in order, with neighbours joined and empty ones removed."""
    joined: list[range] = []
    for free in sorted((r for r in ranges if len(r)), key=lambda r: r.start):
        if joined and joined[-1].stop == free.start:
            joined[-1] = range(joined[-1].start, free.stop)
        else:
            joined.append(free)
    return joined
