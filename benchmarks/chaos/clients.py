"""Clients that count what becomes of every request, and one that watches `/healthz`."""

import multiprocessing
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from multiprocessing.connection import Connection

from benchmarks.photos import jpegs

CLIENTS = 4
TIMEOUT_S = 90.0
# Before another try, after a refusal or where nobody listens.
PAUSE_S = 0.1
HEALTH_INTERVAL_S = 0.05


@dataclass
class Counts:
    """What became of requests.

    Args:
        answered: with 200.
        refused: with 503 and `Retry-After` while there was no worker.
        cut_off: connections that ended with the process which a fault is about.
        lost: everything else, by what happened.
    """

    answered: int = 0
    refused: int = 0
    cut_off: int = 0
    lost: Counter[str] = field(default_factory=Counter)

    def since(self, before: "Counts") -> "Counts":
        """The difference to earlier counts."""
        return Counts(
            self.answered - before.answered,
            self.refused - before.refused,
            self.cut_off - before.cut_off,
            self.lost - before.lost,
        )

    def copy(self) -> "Counts":
        return Counts(self.answered, self.refused, self.cut_off, self.lost.copy())


class Clients:
    """Threads that send photos without pause.

    Attributes:
        counts: since the start.
        cuts: whether connections end with the process that the current fault is about.
        refuses: whether the current fault leaves no worker for a while.
    """

    def __init__(self, port: int, model: str) -> None:
        self.counts = Counts()
        self.cuts = self.refuses = False
        self._port = port
        self._path = f"/classify?model={model}"
        self._photos = jpegs()
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which they run."""
        threads = [threading.Thread(target=self._send, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _send(self, number: int) -> None:
        photo = self._photos[number % len(self._photos)]
        headers = {"Content-Type": "image/jpeg"}
        while not self._stop.is_set():
            connection = HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
            try:
                while not self._stop.is_set():
                    connection.request("POST", self._path, photo, headers)
                    answer = connection.getresponse()
                    answer.read()
                    self._count(answer.status, answer.getheader("Retry-After"))
            except (OSError, HTTPException) as error:
                self._count_broken(error)
                time.sleep(PAUSE_S)
            finally:
                connection.close()

    def _count(self, status: int, retry_after: str | None) -> None:
        with self._lock:
            if status == 200:
                self.counts.answered += 1
                return
            if status == 503 and retry_after and self.refuses:
                self.counts.refused += 1
            else:
                self.counts.lost[str(status)] += 1
        time.sleep(PAUSE_S)

    def _count_broken(self, error: Exception) -> None:
        with self._lock:
            if not self.cuts:
                self.counts.lost[type(error).__name__] += 1
            elif not isinstance(error, ConnectionRefusedError):  # nobody has accepted that one
                self.counts.cut_off += 1


class HealthWatch:
    """A process that asks for `/healthz` on new connections, without pause.

    It is a process of its own so that it measures the server, and not the threads of the clients.
    """

    def __init__(self, port: int) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._received, sent = spawning.Pipe(duplex=False)
        self._process = spawning.Process(target=_watch, args=(port, sent), daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which it runs."""
        self._process.start()
        try:
            yield
        finally:
            self._process.kill()
            self._process.join()

    def slowest_s(self) -> float:
        """The longest time of an answer since the last call, in seconds."""
        slowest = 0.0
        while self._received.poll():
            slowest = max(slowest, self._received.recv())
        return slowest


def _watch(port: int, results: Connection) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    while True:
        started = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
                connection.sendall(request)
                if connection.recv(12) == b"HTTP/1.1 200":
                    results.send(time.monotonic() - started)
        except OSError:  # its process was stopped or killed, which the clients count
            pass
        time.sleep(HEALTH_INTERVAL_S)
