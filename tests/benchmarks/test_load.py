"""The load generator against real servers in threads."""

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from benchmarks.bodies import Body, form, image_or_form, image_or_numbered_form, open_inference
from benchmarks.load import Load, build_requests, closed_loop, open_loop, percentile
from benchmarks.load_process import LoadProcess

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
REQUESTS = build_requests("/path", [Body(b"one", "text/plain"), Body(b"two", "text/plain")])


@contextmanager
def serving(handler: Handler) -> Iterator[int]:
    """A server on a free port, in a thread; the port."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(handler, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(server.wait_closed())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """The body of the next request."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
    return await reader.readexactly(length)


def answering(respond: Callable[[bytes], bytes], *, close: bool = False) -> Handler:
    """A handler that writes `respond(body)`, and closes the connection after it if `close`."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(respond(await read_request(reader)))
                await writer.drain()
                if close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    return handle


def ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def chunked(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


def run_closed(handler: Handler, connections: int = 2) -> Load:
    with serving(handler) as port:
        return asyncio.run(closed_loop(port, REQUESTS, connections, 0.3))


@pytest.mark.parametrize("respond", [ok, chunked])
def test_a_closed_loop_counts_answers_and_keeps_the_last_one_of_each_request(
    respond: Callable[[bytes], bytes],
) -> None:
    load = run_closed(answering(respond))
    assert load.failures == 0
    assert load.answers == {0: b"one", 1: b"two"}
    assert 0 < len(load.latencies) <= load.answered
    assert load.rate == len(load.latencies) / load.span
    assert 0 < load.percentile(0.5) <= load.percentile(0.99)


def test_other_statuses_are_failures_and_not_fast_answers() -> None:
    turns = itertools.count()

    def respond(body: bytes) -> bytes:
        refused = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
        return refused if next(turns) % 2 else ok(body)

    load = run_closed(answering(respond), connections=1)
    answered_or_refused = next(turns)
    assert load.failures + load.answered == answered_or_refused
    assert abs(load.failures - load.answered) <= 1


def test_a_connection_is_opened_again_after_the_server_closed_it() -> None:
    load = run_closed(answering(ok, close=True))
    assert len(load.latencies) > 2


def test_a_server_that_is_gone_fails_requests_and_does_not_hang() -> None:
    with serving(answering(ok)) as port:
        pass
    load = asyncio.run(closed_loop(port, REQUESTS, 1, 0.2))
    assert load.failures > 0
    assert load.answered == 0
    assert load.rate == 0


def test_an_open_loop_sends_at_its_rate_and_counts_the_wait_for_a_slow_server() -> None:
    lock = asyncio.Lock()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = await read_request(reader)
        async with lock:  # one at a time, at 50 per second at most
            await asyncio.sleep(0.02)
        writer.write(ok(body).replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"))
        writer.close()

    with serving(handle) as port:
        load = asyncio.run(open_loop(port, REQUESTS, rate=200, seconds=0.5))
    assert load.failures == 0
    assert 60 < load.answered < 150  # 100 are expected
    # the queue grows, so the last request waits for nearly all before it
    assert max(load.latencies) > 10 * min(load.latencies)


def test_the_load_process_gives_the_same_kind_of_result() -> None:
    with serving(answering(ok)) as port, LoadProcess() as generator:
        closed = generator.closed(port, REQUESTS, 2, 0.3)
        opened = generator.open(port, REQUESTS, 50, 0.3)
    assert closed.answers == {0: b"one", 1: b"two"}
    assert opened.failures == 0
    assert closed.cpu_s > 0


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([3, 1, 2, 4], 0.5) == 3
    assert percentile([3, 1, 2, 4], 0.99) == 4
    assert percentile([], 0.5) == 0


def test_one_image_is_a_body_and_several_are_a_form() -> None:
    assert image_or_form([b"x"]) == Body(b"x", "image/jpeg")
    assert image_or_form([b"x", b"y"]) == form([b"x", b"y"])
    assert form([b"x", b"y"]).content.count(b'name="image"') == 2
    assert b'name="001"' in image_or_numbered_form([b"x", b"y"]).content
    assert b'"shape": [2, 1]' in open_inference([b"x", b"y"]).content
