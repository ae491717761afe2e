"""Values that each thread has for itself."""

import threading
from typing import Any


class PerThread(threading.local):
    """A thread's own values. A copy of an object that has it begins without any."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "PerThread":
        return PerThread()
