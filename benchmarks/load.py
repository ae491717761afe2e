"""A load generator with little overhead: raw keep-alive connections and prebuilt requests."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast


@dataclass(slots=True)
class Load:
    """The result of a run.

    Args:
        latencies: in seconds, of the requests with status 200.
        failures: the number of other requests.
    """

    seconds: float
    latencies: list[float] = field(default_factory=list)
    failures: int = 0

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """The latency in milliseconds that `share` of the requests stay below."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3 if ordered else 0.0


def build_requests(path: str, bodies: Sequence[bytes], media_type: str) -> list[bytes]:
    """The bytes of one HTTP/1.1 request for each body."""
    return [
        f"POST {path} HTTP/1.1\r\nHost: benchmark\r\nContent-Type: {media_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
        for body in bodies
    ]


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._buffer = b""
        self._answered: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answered and not self._answered.done():
            self._answered.set_result(0)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) >= length and self._answered:
            self._buffer = b""
            self._answered.set_result(int(head[9:12]))

    async def send(self, request: bytes) -> int:
        """The status of the response; 0 if the connection was lost."""
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered


async def _connect(port: int) -> _Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(_Connection, "127.0.0.1", port)
    return connection


async def closed_loop(port: int, requests: list[bytes], connections: int, seconds: float) -> Load:
    """A run in which each connection sends its next request when the last one is answered."""
    load = Load(seconds)
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        connection = await _connect(port)
        turn = number
        while (started := time.monotonic()) < end:
            status = await connection.send(requests[turn % len(requests)])
            turn += 1
            if status == 200 and time.monotonic() < end:
                load.latencies.append(time.monotonic() - started)
            elif status != 200:
                load.failures += 1

    await asyncio.gather(*(client(number) for number in range(connections)))
    return load


async def open_loop(port: int, requests: list[bytes], rate: float, seconds: float) -> Load:
    """A run with Poisson arrivals at `rate` per second, whether or not earlier requests are
    answered. Latencies count from the time at which a request was due."""
    load = Load(seconds)
    idle = [await _connect(port) for _ in range(8)]
    tasks = set()
    chance = random.Random(7)

    async def one(due: float, request: bytes) -> None:
        connection = idle.pop() if idle else await _connect(port)
        status = await connection.send(request)
        idle.append(connection)
        if status == 200:
            load.latencies.append(time.monotonic() - due)
        else:
            load.failures += 1

    due = time.monotonic()
    end = due + seconds
    turn = 0
    while (due := due + chance.expovariate(rate)) < end:
        await asyncio.sleep(due - time.monotonic())
        task = asyncio.create_task(one(due, requests[turn % len(requests)]))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        turn += 1
    await asyncio.gather(*tasks)
    return load
