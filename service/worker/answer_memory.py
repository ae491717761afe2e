"""The memory of answers, from their making until nobody refers to them any more."""

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np

from service.errors import UnavailableError

# Smaller arrays are not counted: the numbers of a request's answer are bounded before, and the
# count would take longer than making them.
COUNTED_BYTES = 64 * 1024
RETRY_AFTER_S = 1.0


class AnswerMemory:
    """Counts the bytes of large arrays. May be used from any thread."""

    def __init__(self, capacity: int) -> None:
        """
        Args:
            capacity: bytes of all arrays together.
        """
        self._capacity = capacity
        self._taken = 0
        self._lock = threading.Lock()
        # Sizes of arrays that are gone. An array's end may come in any thread, and while that
        # thread has the lock.
        self._freed: deque[int] = deque()

    def hold(self, results: Iterable[Mapping[str, np.ndarray] | Exception]) -> None:
        """Count the arrays of results for as long as they exist.

        Raises:
            UnavailableError: all arrays together would take more than the capacity. None of these
                is counted.
        """
        large = [
            array
            for result in results
            if isinstance(result, Mapping)
            for array in result.values()
            if array.nbytes >= COUNTED_BYTES
        ]
        if not large:
            return
        size = sum(array.nbytes for array in large)
        with self._lock:
            while self._freed:
                self._taken -= self._freed.popleft()
            if self._taken + size > self._capacity:
                raise UnavailableError(
                    f"answers in flight take {self._taken} bytes, and this one {size}; the limit "
                    f"is {self._capacity}. Send fewer images at a time",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._taken += size
        for array in large:
            weakref.finalize(array, self._freed.append, array.nbytes).atexit = False
