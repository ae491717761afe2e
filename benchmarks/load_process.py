"""The load generator in a process of its own, so that its work is not the comparison's."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import uvloop

from benchmarks.load import Load, closed_loop, open_loop


class LoadProcess:
    """A context manager that starts the process and ends it."""

    def __enter__(self) -> "LoadProcess":
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def closed(self, port: int, requests: list[bytes], connections: int, seconds: float) -> Load:
        """See `closed_loop`."""
        return self._pool.submit(_closed, port, requests, connections, seconds).result()

    def open(self, port: int, requests: list[bytes], rate: float, seconds: float) -> Load:
        """See `open_loop`."""
        return self._pool.submit(_open, port, requests, rate, seconds).result()


def _closed(port: int, requests: list[bytes], connections: int, seconds: float) -> Load:
    return uvloop.run(closed_loop(port, requests, connections, seconds))


def _open(port: int, requests: list[bytes], rate: float, seconds: float) -> Load:
    return uvloop.run(open_loop(port, requests, rate, seconds))
