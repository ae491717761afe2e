"""The inputs that wait to be decoded, in the order of turns, and the threads that decode them."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from service.worker.costs import moved
from service.worker.turns import Waiting, work_ahead

Clock = Callable[[], float]


@dataclass(slots=True, eq=False)
class Source:
    """A request whose inputs are to be decoded.

    Args:
        kind: inputs of one kind cost about the same.
        decode_next: decodes one input, in a thread of the pool. Must not raise.
        remaining: inputs that no thread has begun.
        seconds: what decoding each of them is expected to take.
    """

    client: str
    bulk: bool
    kind: str
    decode_next: Callable[[], None]
    remaining: int
    seconds: float = 0.0


class DecodeQueue:
    """Requests take turns, one input each. All methods may be called from any thread."""

    def __init__(self, pool: Executor, threads: int, clock: Clock = time.monotonic) -> None:
        """
        Args:
            pool: runs the decoding; it may run other work, too. It has a thread more than
                `threads`, which is left for others while one client's images take long.
            threads: the inputs of one client that are decoded at the same time.
        """
        self._pool = pool
        self._threads = threads
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: Waiting[Source] = Waiting()
        # Expected seconds of work that no thread has begun, by client: interactive, and bulk.
        self._backlog: tuple[dict[str, float], dict[str, float]] = ({}, {})
        self._running: dict[int, float] = {}  # when each busy thread is expected to end
        self._busy: Counter[str] = Counter()  # threads of each client
        self._seconds: dict[str, float] = {}  # moving averages, by kind
        self._depth = 0

    def add(self, source: Source) -> None:
        """Have the inputs of a request decoded."""
        with self._lock:
            source.seconds = self._seconds.get(source.kind, 0.0)
            self._count(source, source.remaining)
        for _ in range(min(self._threads, source.remaining)):
            self._put(source)

    def withdraw(self, source: Source) -> None:
        """Leave out the inputs that no thread has begun."""
        with self._lock:
            self._count(source, -source.remaining)
            source.remaining = 0
            self._waiting.remove(lambda waiting: waiting is source)

    def measured(self, kind: str, seconds: float) -> None:
        """Take account of an input that was decoded in that time."""
        with self._lock:
            self._seconds[kind] = moved(self._seconds.get(kind), seconds)

    def seconds(self, kind: str) -> float:
        """What decoding an input is expected to take; 0 before the first one."""
        return self._seconds.get(kind, 0.0)

    def forecast(self, kind: str, count: int, client: str, *, bulk: bool) -> float:
        """Estimated seconds until a client's further inputs are decoded."""
        with self._lock:
            each = self._seconds.get(kind, 0.0)
            own = count * each
            ahead = work_ahead(*self._backlog, client, own, is_bulk=bulk)
            now = self._clock()
            running = sum(max(0.0, end - now) for end in self._running.values())
            return max(each, (running + ahead + own) / self._threads)

    def depth(self) -> int:
        """The number of inputs that no thread has begun."""
        return self._depth

    def state(self) -> dict[str, Any]:
        """What waits and what runs, as JSON for people. Seconds are estimates."""
        with self._lock:
            interactive, bulk = self._backlog
            return {
                "waiting_inputs": self._depth,
                "decoding_inputs": dict(self._busy),
                "waiting_seconds": {"interactive": dict(interactive), "bulk": dict(bulk)},
                "seconds_each": dict(self._seconds),
            }

    def _put(self, source: Source) -> None:
        with self._lock:
            self._waiting.put(source, source.client, source, bulk=source.bulk)
        self._pool.submit(self._run)

    def _run(self) -> None:
        """Decode the input whose turn it is."""
        thread = threading.get_ident()
        with self._lock:
            if (source := self._next()) is None:
                return
            source.remaining -= 1
            self._count(source, -1)
            self._running[thread] = self._clock() + source.seconds
            self._busy[source.client] += 1
        source.decode_next()
        with self._lock:
            del self._running[thread]
            self._busy[source.client] -= 1
            if not self._busy[source.client]:
                del self._busy[source.client]
            if source.remaining:
                self._waiting.put(source, source.client, source, bulk=source.bulk)
            more = bool(len(self._waiting))
        if more:  # also for one that was passed over
            self._pool.submit(self._run)

    def _next(self) -> Source | None:
        """The source whose turn it is. Clients that have their share of the threads are passed
        over: the end of one of their inputs calls again."""
        passed_over: list[Source] = []
        found = None
        while len(self._waiting) and found is None:
            source = self._waiting.take()
            if not source.remaining:
                continue
            if self._busy[source.client] < self._threads:
                found = source
            else:
                passed_over.append(source)
        for source in passed_over:
            self._waiting.put(source, source.client, source, bulk=source.bulk)
        return found

    def _count(self, source: Source, count: int) -> None:
        self._depth += count
        backlog = self._backlog[source.bulk]
        backlog[source.client] = backlog.get(source.client, 0.0) + count * source.seconds
        if backlog[source.client] < 1e-9:  # nothing but rounding is left
            del backlog[source.client]
