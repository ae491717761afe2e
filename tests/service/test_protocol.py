"""The HTTP protocol's timers and its counting of unread answers, without a network."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from prometheus_client import CollectorRegistry
from uvicorn.server import ServerState

from service.gateway.in_pieces import PIECE_BYTES
from service.gateway.loop_turns import LoopTurns
from service.gateway.protocol import ImpatientProtocol
from service.gateway.shedding import Shedding
from service.holdings import Holdings
from service.metrics import Metrics

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
LONG_S = 600.0


class Wire:
    """A transport whose client reads nothing; the loop's transports tell the protocol to pause."""

    def __init__(self, is_tls: bool = False) -> None:
        self.is_tls = is_tls
        self.written: list[bytes] = []
        self.protocol: Any = None
        self.ended: list[str] = []
        self.asked: list[str] = []  # the paths that the application was called for

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return object() if self.is_tls and name == "sslcontext" else default

    def set_write_buffer_limits(self, high: int) -> None:
        assert high == PIECE_BYTES

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self.written))

    def write(self, data: bytes) -> None:
        self.written.append(bytes(data))
        if self.get_write_buffer_size() > PIECE_BYTES and not self.protocol.flow.write_paused:
            self.protocol.pause_writing()

    def close(self) -> None:
        self.ended.append("closed")

    def abort(self) -> None:
        self.ended.append("aborted")

    def is_closing(self) -> bool:
        return bool(self.ended)

    def pause_reading(self) -> None:
        """Nothing comes by itself."""

    resume_reading = pause_reading

    async def end(self, how: str) -> None:
        while how not in self.ended:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def begin(
    body: bytes = b"",
    wire: Wire | None = None,
    *,
    gate: asyncio.Event | None = None,
    header_timeout_s: float = LONG_S,
    body_timeout_s: float = LONG_S,
    unread: Holdings | None = None,
) -> tuple[Any, Wire]:
    """A connection to an application that answers all requests with this body."""
    wire = wire or Wire()

    async def app(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        wire.asked.append(scope["path"])
        if gate is not None:
            await gate.wait()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    class Protocol(ImpatientProtocol):
        held = Holdings(10)
        turns = LoopTurns()
        shedding = Shedding(held, turns, Metrics(CollectorRegistry()))

    Protocol.header_timeout_s, Protocol.body_timeout_s = header_timeout_s, body_timeout_s
    Protocol.unread = unread or Holdings(10**6)
    config = uvicorn.Config(app, timeout_keep_alive=int(LONG_S), ws="none", log_config=None)
    protocol: Any = Protocol(config, ServerState(), {})
    wire.protocol = protocol
    assert protocol.count("client")  # as the listener does
    protocol.connection_made(wire)
    return protocol, wire


async def answered(wire: Wire) -> None:
    while not wire.protocol.cycle.response_complete:  # noqa: ASYNC110
        await asyncio.sleep(0)


def run(case: Awaitable[None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(case, 20)

    asyncio.run(limited())


def test_a_body_after_its_answer_leaves_the_time_to_the_next_request() -> None:
    async def case() -> None:
        protocol, wire = await begin()
        protocol.data_received(HEAD)
        await answered(wire)
        protocol.timeout_keep_alive = 0
        protocol.data_received(b"body")
        await wire.end("closed")

    run(case())


@pytest.mark.parametrize("behind", [b"G", HEAD], ids=["head", "body"])
def test_what_is_behind_a_request_waits_for_its_answer(
    behind: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.gateway.protocol.ANSWER_MARGIN_S", 0)

    async def case() -> None:
        gate = asyncio.Event()
        protocol, wire = await begin(gate=gate, header_timeout_s=0.01, body_timeout_s=0.01)
        protocol.data_received(GET + behind)
        fired = protocol._timer
        while protocol._timer is fired:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert not wire.ended
        gate.set()
        await wire.end("closed")

    run(case())


def test_one_answer_of_any_size_may_wait_but_no_further_one() -> None:
    async def case() -> None:
        unread = Holdings(100_000)
        wires = []
        for _ in range(2):
            protocol, wire = await begin(bytes(200_000), unread=unread)
            protocol.data_received(GET)
            await answered(wire)
            await asyncio.sleep(0)
            wires.append(wire)
        assert [wire.ended for wire in wires] == [[], ["aborted"]]
        assert unread.taken == wires[0].get_write_buffer_size()
        wires[0].protocol.resume_writing()
        assert unread.taken == 0

    run(case())


@pytest.mark.parametrize("at_once", [True, False], ids=["pipelined", "later"])
def test_a_request_begins_once_the_answer_before_is_read(at_once: bool) -> None:
    """Its answer would be held, too, and is counted only when it is written."""

    async def case() -> None:
        protocol, wire = await begin(bytes(200_000))
        protocol.data_received(GET + GET.replace(b"/ ", b"/second ", 1) * at_once)
        while b"".join(wire.written).count(bytes(200_000)) < 1:  # noqa: ASYNC110
            await asyncio.sleep(0)
        if not at_once:
            protocol.data_received(GET.replace(b"/ ", b"/second ", 1))
        for _ in range(10):
            await asyncio.sleep(0)
        assert wire.asked == ["/"]
        wire.written.clear()
        protocol.resume_writing()
        await answered(wire)
        assert wire.asked == ["/", "/second"]

    run(case())


def test_a_request_behind_an_answer_that_is_never_read_does_not_begin(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def case() -> None:
        protocol, wire = await begin(bytes(200_000), body_timeout_s=0.01)
        protocol.data_received(GET + GET)
        await wire.end("aborted")
        protocol.connection_lost(None)
        for _ in range(10):
            await asyncio.sleep(0)
        assert wire.asked == ["/"]

    run(case())
    assert "ASGI" not in caplog.text


def test_a_request_behind_an_answer_that_is_read_as_its_connection_closes_does_not_begin(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def case() -> None:
        protocol, wire = await begin(bytes(200_000))
        protocol.data_received(GET + GET)
        while b"".join(wire.written).count(bytes(200_000)) < 1:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # the second one waits now
        wire.close()
        wire.written.clear()
        protocol.resume_writing()
        for _ in range(10):
            await asyncio.sleep(0)
        assert wire.asked == ["/"]

    run(case())
    assert "ASGI" not in caplog.text


@pytest.mark.parametrize(
    "body",
    [b"1\r\nx\r\n" * 1100, b"0\r\n" + b"a:b\r\n" * 300],
    ids=["chunks", "trailers"],
)
def test_many_small_parts_of_a_body_end_its_connection(body: bytes) -> None:
    """Each takes a call: a few megabytes of them stopped the event loop for half a second."""

    async def case() -> None:
        gate = asyncio.Event()
        protocol, wire = await begin(gate=gate)
        protocol.data_received(CHUNKED + body)
        assert wire.ended
        gate.set()
        await answered(wire)

    run(case())


def test_chunks_of_some_bytes_are_read() -> None:
    async def case() -> None:
        protocol, wire = await begin(gate=asyncio.Event())
        protocol.data_received(CHUNKED + b"1\r\nx\r\n" * 900 + b"28\r\n%s\r\n" % bytes(40) * 9000)
        assert not wire.ended
        assert len(protocol.cycle.body) == 900 + 9000 * 40

    run(case())


def test_answers_over_tls_are_written_in_pieces_and_counted_whole() -> None:
    async def case() -> None:
        body = bytes(range(250)) * 1000
        protocol, wire = await begin(body, Wire(is_tls=True))
        protocol.data_received(GET)
        await answered(wire)
        await asyncio.sleep(0)
        assert max(map(len, wire.written)) == PIECE_BYTES
        assert b"".join(wire.written).endswith(b"\r\n\r\n" + body)
        assert protocol.unread.taken == wire.get_write_buffer_size()

    run(case())


def test_an_idle_connection_that_does_not_end_is_aborted_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.gateway.protocol.CLOSE_S", 0.01)

    async def case() -> None:
        protocol, wire = await begin(wire=Wire(is_tls=True))
        protocol.shutdown()
        await wire.end("aborted")
        assert wire.ended == ["closed", "aborted"]

    run(case())


@pytest.mark.parametrize("closing", [False, True])
def test_what_is_never_read_does_not_keep_a_closed_connection(
    closing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def case() -> None:
        protocol, wire = await begin(b"small", body_timeout_s=0.01)
        protocol.data_received(GET.replace(b"1.1", b"1.0") if closing else GET)
        await answered(wire)
        if not closing:
            protocol.shutdown()
        await wire.end("aborted")
        assert wire.ended == ["closed", "aborted"]

    run(case())
    assert "unread bytes" in caplog.text
