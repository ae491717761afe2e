"""One process of a bare loop."""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from benchmarks.arrangement import Arrangement
from models import Model
from models.inference import HeadCall, decode, prepare_pieces, run_rows
from models.inputs.images import DEFAULT_LIMITS
from service.worker.runner import use_threads

# An image as the trunk takes it, and its (width, height).
Prepared = tuple[Tensor, tuple[int, int]]


class BareLoop:
    """Classifies photos in turn, as fast as an arrangement of threads does."""

    def __init__(self, model: Model, photos: Sequence[bytes], arrangement: Arrangement) -> None:
        self._trunk = model.trunk
        self._head = model.head(None, {})
        self._photos = photos
        self._arrangement = arrangement

    def rate(self, seconds: float) -> float:
        """Images per second: those whose pass ends within `seconds`, over the time until the last
        such pass ended."""
        arrangement = self._arrangement
        start = time.monotonic()
        end = start + seconds
        passes: list[float] = []  # when each ended
        ready: queue.Queue[Prepared] = queue.Queue(4 * arrangement.batch)
        stop = threading.Event()

        def feed(source: Iterator[bytes]) -> None:
            while not stop.is_set():
                ready.put(self._prepare(next(source)))

        def loop(take: Callable[[], Prepared]) -> None:
            use_threads(arrangement.threads)
            while time.monotonic() < end:
                self._classify([take() for _ in range(arrangement.batch)])
                passes.append(time.monotonic())

        def decoding(source: Iterator[bytes]) -> Callable[[], Prepared]:
            return lambda: self._prepare(next(source))

        for number in range(arrangement.decoders):
            # a daemon: it may wait for room in the queue at the end
            threading.Thread(target=feed, args=(self._source(number),), daemon=True).start()
        takes = [
            ready.get if arrangement.decoders else decoding(self._source(number))
            for number in range(arrangement.loops)
        ]
        loops = [threading.Thread(target=loop, args=(take,)) for take in takes]
        for thread in loops:
            thread.start()
        for thread in loops:
            thread.join()
        stop.set()
        counted = [ended for ended in passes if ended < end]
        return len(counted) * arrangement.batch / (max(counted) - start) if counted else 0.0

    def _source(self, number: int) -> Iterator[bytes]:
        """All photos, over and over, from a start of its own."""
        return itertools.cycle([*self._photos[number:], *self._photos[:number]])

    def _prepare(self, photo: bytes) -> Prepared:
        image = decode(photo, DEFAULT_LIMITS, self._trunk.min_side)
        return prepare_pieces(image, self._trunk, None, DEFAULT_LIMITS)[0], image.size

    def _classify(self, prepared: Sequence[Prepared]) -> None:
        batch = self._trunk.collate([pixels for pixels, _ in prepared])
        rows = run_rows(self._trunk, batch, HeadCall.of(self._head, {}))
        for row, (_, size) in zip(rows, prepared, strict=True):
            self._head.finish(row, size)
