"""The work that waits, kept up to date by client, so that no request adds up all queues."""

from collections import Counter

from service.worker.batch_queue import BatchQueue

NS = 1e9


class Workload:
    """Lane nanoseconds of waiting images by client, over all queues.

    They are integers, so that sums are exact however often a queue's part is replaced.

    Attributes:
        admitted: of images that are admitted but not yet running: interactive ones, and bulk.
        decoded: the same of those of them that wait in a queue.
    """

    def __init__(self) -> None:
        self.admitted: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        self.decoded: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        self._sums = *self.admitted, *self.decoded
        # What each queue has added to the sums.
        self._parts: dict[BatchQueue, list[dict[str, int]]] = {}

    @property
    def seconds(self) -> float:
        """Lane seconds of all admitted images."""
        return sum(counts.total() for counts in self.admitted) / NS

    def update(self, queue: BatchQueue) -> None:
        """Replace a queue's part by what waits in it now."""
        size = min(queue.admitted, queue.limit.value)
        each = round(queue.costs.per_image(size) * NS) if size else 0
        places, decoded = queue.places, queue.decoded
        images = places.interactive, places.bulk, decoded.interactive.counts, decoded.bulk.counts
        new = [{client: count * each for client, count in c.items() if each} for c in images]
        for sums, part in zip(self._sums, self._parts.pop(queue, ()), strict=False):
            sums.subtract(part)
            for client in part:
                if not sums[client]:
                    del sums[client]
        if any(new):
            self._parts[queue] = new
            for sums, part in zip(self._sums, new, strict=True):
                sums.update(part)
