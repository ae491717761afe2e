"""The protocol of an HTTP connection."""

import asyncio
import json
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.clients import identify
from service.errors import UnavailableError
from service.gateway.disconnect import disconnect
from service.gateway.loop_turns import LoopTurns
from service.holdings import Holdings

# Of the headers of a request, and of its trailers.
MAX_HEADER_BYTES = 64 * 1024
# Every look at a header goes through all of them.
MAX_HEADERS = 256
# Requests that wait on a connection for the answers of those before them.
MAX_PIPELINED = 32
# Time for the answer that a body was too slow, before its connection is closed.
ANSWER_MARGIN_S = 2.0

_TOO_MANY = json.dumps(
    {
        "type": f"urn:vitrail:problem:{UnavailableError.slug}",
        "title": UnavailableError.title,
        "status": UnavailableError.status,
        "detail": "too many connections",
    }
).encode()
_TOO_MANY_CONNECTIONS = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\n"
    b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
    % (len(_TOO_MANY), _TOO_MANY)
)


class ImpatientProtocol(HttpToolsProtocol):
    """Closes connections that are too slow or send too much, which uvicorn does not limit, and
    cancels the work of requests whose connection is lost.

    A connection waits for one thing at a time, which one timer limits: for headers, for a body with
    its trailers, or after stray bytes for the next request. Reading of the answer has another.
    uvicorn limits the time of connections that are idle after an answer, `read_body` answers to
    bodies that are too slow.
    """

    header_timeout_s: float
    body_timeout_s: float
    held: Holdings  # connections
    unread: Holdings  # bytes of answers that wait to be read
    turns: LoopTurns
    _address: str | None = None
    # The request that is being answered. Those that came behind it on the connection wait, and
    # uvicorn's `cycle` is the last of them.
    _answering: RequestResponseCycle | None = None
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _unread_bytes = 0
    _header_bytes = 0
    _in_message = False
    _in_body = False
    _has_begun = False

    def count(self, address: str) -> bool:
        """Count the connection among those of its client; False if there are too many."""
        if not self.held.fits(address, 1):
            return False
        self.held.take(address, 1)
        self._address = address
        return True

    def give_back(self) -> None:
        """Count the connection no more, if it was counted."""
        if self._address is not None:
            self.held.give_back(self._address, 1)
            self._address = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._pieces: list[bytes] = []  # of a body, received and not passed on
        if self._address is None and not self.count(
            identify(None, self.client[0] if self.client else "")
        ):
            self.transport.write(_TOO_MANY_CONNECTIONS)
            self.transport.close()
            return
        self._start_timer(self.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self.turns.received(self.loop)
        is_idle = self.cycle is not None and self.cycle.response_complete
        was_in_message, self._has_begun = self._in_message, False
        super().data_received(data)
        self._pass_on_pieces()
        if self._in_message and not self._in_body:
            if not self._has_begun:  # else most of it may be of the messages before
                self._count(len(data))
        elif is_idle and not (was_in_message or self._has_begun) and self._timer is None:
            self._start_timer(self.header_timeout_s)  # uvicorn has stopped its own

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self.transport.close()
            raise ValueError("too many requests wait")  # ends the parsing
        super().on_message_begin()
        self.scope["state"]["started"] = time.monotonic() - self.turns.seconds()
        self._in_message, self._in_body, self._has_begun = True, False, True
        self._start_timer(self.header_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_body:  # a trailer; nobody reads them
            self._count(len(name) + len(value))
            return
        if len(self.headers) >= MAX_HEADERS:
            raise ValueError("too many headers")  # answered with 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_body, self._header_bytes = True, 0
        self._start_timer(self.body_timeout_s + ANSWER_MARGIN_S)
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._answering = self.pipeline[-1][0]
        super().on_response_complete()

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._pass_on_pieces()
        self._in_message = False
        self._stop_timer()
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        size = self.transport.get_write_buffer_size()
        if self._address is None or not self.unread.fits(self._address, size):
            self._abort()
            return
        self.unread.take(self._address, size)
        self._unread_bytes = size
        self._write_timer = self.loop.call_later(self.body_timeout_s, self._abort)

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(error)
        self.give_back()
        if (request := self._answering) is not None and not request.response_complete:
            request.disconnected = True  # what it writes from now on is dropped
            disconnect(request.scope)

    def _pass_on_pieces(self) -> None:
        """Pass on what was received of a body, all chunks at once: uvicorn copies the body for each
        of them, which takes long if they have a byte each."""
        if self._pieces:
            super().on_body(b"".join(self._pieces))
            self._pieces.clear()

    def _count(self, size: int) -> None:
        """Count bytes of headers or trailers."""
        self._header_bytes += size
        if self._header_bytes > MAX_HEADER_BYTES:
            self.transport.close()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._header_bytes = 0

    def _abort(self) -> None:
        if self._answering is not None:
            self._answering.disconnected = True
        self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        if self._address is not None and self._unread_bytes:
            self.unread.give_back(self._address, self._unread_bytes)
            self._unread_bytes = 0
