"""A load generator with little overhead: raw keep-alive connections and prebuilt requests."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httptools

from benchmarks.bodies import Body

# How long a run waits for the last answers.
GRACE_S = 120.0
RECONNECT_S = 0.05


@dataclass(slots=True)
class Load:
    """The result of a run.

    Args:
        span: seconds from the first request to the last answer that counts, so that a server which
            answers whole batches is not charged for one that is under way at the end.
        latencies: in seconds, of the requests that were answered with status 200 and count.
        answered: the number of requests with status 200, also of those that came too late to count.
        failures: the number of other requests.
        statuses: the number of requests by status; 0 for those without an answer.
        answers: for each request, by its number, the body of the last answer.
        cpu_s: the load generator's own processor time.
        lags: how late requests of an open loop were sent, in seconds.
    """

    span: float = 0.0
    latencies: list[float] = field(default_factory=list)
    answered: int = 0
    failures: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    answers: dict[int, bytes] = field(default_factory=dict)
    cpu_s: float = 0.0
    lags: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.span if self.span else 0.0

    def percentile(self, share: float) -> float:
        """The latency in milliseconds that `share` of the requests stay below."""
        return percentile(self.latencies, share) * 1e3


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the values stay below, or 0 without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def build_requests(path: str, bodies: Sequence[Body], headers: str = "") -> list[bytes]:
    """The bytes of one HTTP/1.1 request for each body.

    Args:
        headers: further header lines, each with its line end.
    """
    return [
        f"POST {path} HTTP/1.1\r\nHost: benchmark\r\n{headers}Content-Type: {body.media_type}\r\n"
        f"Content-Length: {len(body.content)}\r\n\r\n".encode()
        + body.content
        for body in bodies
    ]


class _Connection(asyncio.Protocol):
    """One connection. It answers one request at a time and opens again after it was closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.WriteTransport | None = None
        self._answered: asyncio.Future[tuple[int, bytes]]

    async def open(self) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self._port)

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """The status and body of the response; status 0 if the connection was lost."""
        if self._transport is not None:
            self._expect_answer()
        else:
            try:
                await self.open()
            except OSError:
                await asyncio.sleep(RECONNECT_S)
                return 0, b""
        if self._transport is not None:  # else it was answered and closed at once
            self._transport.write(request)
        return await self._answered

    def _expect_answer(self) -> None:
        self._answered = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._body = b""

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._expect_answer()  # a full server answers before there is a request
        self._transport = cast("asyncio.WriteTransport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._answer(0)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        self._answer(self._parser.get_status_code())

    def _answer(self, status: int) -> None:
        if not self._answered.done():
            self._answered.set_result((status, self._body))


async def closed_loop(port: int, requests: list[bytes], connections: int, seconds: float) -> Load:
    """A run in which each connection sends its next request when the last one is answered.

    Answers that come after `seconds` do not count, except failures.
    """
    load = Load()
    start = time.monotonic()
    end = start + seconds

    async def client(turn: int) -> None:
        connection = _Connection(port)
        while (sent := time.monotonic()) < end:
            number = turn % len(requests)
            status, body = await connection.send(requests[number])
            load.statuses[status] += 1
            turn += 1
            answered = time.monotonic()
            if status != 200:
                load.failures += 1
                continue
            load.answered += 1
            load.answers[number] = body
            if answered < end:
                load.latencies.append(answered - sent)
                load.span = answered - start
        connection.close()

    await _measured(load, [client(number) for number in range(connections)], seconds)
    return load


async def open_loop(port: int, requests: list[bytes], rate: float, seconds: float) -> Load:
    """A run with Poisson arrivals at `rate` per second, whether or not earlier requests are
    answered. Latencies count from the time at which a request was due."""
    load = Load()
    idle = [_Connection(port) for _ in range(8)]
    chance = random.Random(7)
    start = time.monotonic()

    async def arrival(due: float, number: int) -> None:
        await asyncio.sleep(due - time.monotonic())
        load.lags.append(time.monotonic() - due)
        connection = idle.pop() if idle else _Connection(port)
        status, body = await connection.send(requests[number])
        idle.append(connection)
        load.statuses[status] += 1
        if status != 200:
            load.failures += 1
            return
        load.answered += 1
        load.answers[number] = body
        load.latencies.append(time.monotonic() - due)
        load.span = time.monotonic() - start

    arrivals: list[Coroutine[Any, Any, None]] = []
    due = start
    while (due := due + chance.expovariate(rate)) < start + seconds:
        arrivals.append(arrival(due, len(arrivals) % len(requests)))
    await _measured(load, arrivals, seconds)
    for connection in idle:
        connection.close()
    return load


async def _measured(
    load: Load, clients: Sequence[Coroutine[Any, Any, None]], seconds: float
) -> None:
    """Run clients to their end. Those that still wait after the grace period count as failures."""
    cpu_s = time.process_time()
    if clients:
        tasks = [asyncio.create_task(client) for client in clients]
        _, waiting = await asyncio.wait(tasks, timeout=seconds + GRACE_S)
        for task in waiting:
            task.cancel()
        load.failures += len(waiting)
        load.statuses[0] += len(waiting)
        await asyncio.gather(*(task for task in tasks if task not in waiting))
    load.cpu_s = time.process_time() - cpu_s
