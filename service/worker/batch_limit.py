"""The most images that a trunk's batches may hold. Pure policy.

A batch for which memory runs out is halved, and so are later ones. What took the memory may go away
again (another batch, another process), so after enough full batches the limit doubles. The wait
doubles each time that memory runs out, so that a limit that is real costs few failed batches.
"""

FIRST_PATIENCE = 32
MAX_PATIENCE = 4096


class BatchLimit:
    """Args:
    most: the limit while memory suffices.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._patience = FIRST_PATIENCE
        self._full_batches = 0
        self.value = most

    def ran(self, size: int) -> None:
        """Count a batch of `size` images that has succeeded."""
        if self.value == self._most or size < self.value:
            return
        self._full_batches += 1
        if self._full_batches >= self._patience:
            self._full_batches = 0
            self.value = min(self._most, 2 * self.value)

    def ran_out(self, size: int) -> None:
        """Lower the limit: memory has run out for a batch of `size` images."""
        self.value = max(1, min(self.value, size // 2))
        self._full_batches = 0
        self._patience = min(MAX_PATIENCE, 2 * self._patience)
