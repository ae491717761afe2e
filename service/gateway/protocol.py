"""The protocol of an HTTP connection."""

import asyncio
import logging
import time
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.gateway.disconnect import disconnect
from service.gateway.in_pieces import InPieces
from service.gateway.loop_turns import LoopTurns
from service.gateway.shedding import Shedding
from service.holdings import Holdings

logger = logging.getLogger(__name__)

# Of the headers of a request, and of its trailers.
MAX_HEADER_BYTES = 64 * 1024
# Every look at a header goes through all of them.
MAX_HEADERS = 256
# Each chunk of a body takes a call. So many may be small; the others have so many bytes on average.
FEW_CHUNKS = 1000
MIN_CHUNK_BYTES = 32
# Requests that wait on a connection for the answers of those before them.
MAX_PIPELINED = 32
# Time for the answer that a body was too slow, before its connection is closed.
ANSWER_MARGIN_S = 2.0
# Time for a client of TLS to say that it has seen the end of its idle connection.
CLOSE_S = 2.0


class ImpatientProtocol(HttpToolsProtocol):
    """Closes connections that are too slow or send too much, which uvicorn does not limit, and
    cancels the work of requests whose connection is lost.

    A connection waits for one thing at a time, which one timer limits: for headers, for a body with
    its trailers, or after stray bytes for the next request. It does not close a connection whose
    requests before are being answered. Reading of the answer, also after `close`, has another.
    While an answer waits to be read, no further request of its connection is begun.
    uvicorn limits the time of connections that are idle after an answer, `read_body` answers to
    bodies that are too slow.
    """

    header_timeout_s: float
    body_timeout_s: float
    held: Holdings  # connections
    unread: Holdings  # bytes of answers that wait to be read
    turns: LoopTurns
    shedding: Shedding
    _address: str | None = None
    # The request that is being answered. Those that came behind it on the connection wait, and
    # uvicorn's `cycle` is the last of them.
    _answering: RequestResponseCycle | None = None
    _timer: asyncio.TimerHandle | None = None
    _timer_s = 0.0
    _write_timer: asyncio.TimerHandle | None = None
    _unread_bytes = 0
    _header_bytes = 0
    _chunks = 0
    _body_bytes = 0
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
        is_tls = transport.get_extra_info("sslcontext") is not None
        super().connection_made(InPieces(transport) if is_tls else transport)  # type: ignore[arg-type]
        self._pieces: list[bytes] = []  # of a body, received and not passed on
        self._start_timer(self.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self.turns.received(self.loop)
        was_in_message, self._has_begun = self._in_message, False
        super().data_received(data)
        self._pass_on_pieces()
        if self._in_message and not (self._in_body or self._has_begun):
            self._count(len(data))  # if it has begun, most may be of the messages before
        if self.transport.is_closing():
            self._abort_after(self.body_timeout_s)
        elif not self._in_message and self._is_without_timer():  # uvicorn has stopped its own
            if was_in_message:  # the rest of a request that was answered before
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
            else:
                self._start_timer(self.header_timeout_s)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self.transport.close()
            raise ValueError("too many requests wait")  # ends the parsing
        super().on_message_begin()
        self.scope["state"]["started"] = time.monotonic() - self.turns.seconds()
        self._in_message, self._in_body, self._has_begun = True, False, True
        self._start_timer(self.header_timeout_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_body:  # a trailer; nobody reads them, and there are no more than headers
            self._count(max(len(name) + len(value), MAX_HEADER_BYTES // MAX_HEADERS))
            if self.transport.is_closing():
                raise ValueError("too many trailers")  # ends the parsing
            return
        if len(self.headers) >= MAX_HEADERS:
            raise ValueError("too many headers")  # answered with 400
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_body, self._header_bytes = True, 0
        self._chunks = self._body_bytes = 0
        self._start_timer(self.body_timeout_s + ANSWER_MARGIN_S)
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._answering = self.pipeline[-1][0]
        if self.transport.is_closing():
            self._abort_after(self.body_timeout_s)
        elif self._timer is not None and (self.pipeline or not self._in_body):
            self._restart_timer()  # for what is behind this request, and may not have been read
        super().on_response_complete()

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > FEW_CHUNKS + self._body_bytes // MIN_CHUNK_BYTES:
            self.transport.close()
            raise ValueError("too many small chunks")  # ends the parsing

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._pass_on_pieces()
        self._in_message = False
        self._stop_timer()
        super().on_message_complete()
        # uvicorn pauses after a large piece until the next one is asked for, and there is none: a
        # disconnect would not be seen.
        if not self.pipeline:
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_after(self.body_timeout_s)
        self.loop.call_soon(self._count_unread)  # when all pieces have been written

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()
        if self.transport.is_closing():
            self._abort_after(self.body_timeout_s)

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self._close_idle()
        else:
            super().shutdown()

    def timeout_keep_alive_handler(self) -> None:
        self._close_idle()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        super().connection_lost(error)
        self.give_back()
        if (request := self._answering) is not None and not request.response_complete:
            request.disconnected = True  # what it writes from now on is dropped
            disconnect(request.scope)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if self._address and self.shedding.sheds(cycle.scope["method"], self._address):
            app = self.shedding.refuse
        super()._start_asgi_task(cycle, partial(self._once_read, cycle, app))

    async def _once_read(self, cycle: RequestResponseCycle, app: Any, *request: Any) -> None:
        """Call the application once the answers before have been read. What it would make meanwhile
        is counted only when it is written."""
        if self.flow.write_paused:
            await self.flow.drain()
            if self.transport.is_closing():
                cycle.disconnected = True  # else uvicorn logs that there is no answer
                return
        await app(*request)

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

    def _is_without_timer(self) -> bool:
        """Whether an answered connection waits without end."""
        return (
            self.cycle is not None
            and self.cycle.response_complete
            and self._timer is None
            and self.timeout_keep_alive_task is None
        )

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer_s = seconds
        self._restart_timer()

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self._timer_s, self._time_out)

    def _time_out(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if self.flow.read_paused or self.pipeline or (is_answering and not self._in_body):
            self._restart_timer()
        else:
            self._close_idle()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._header_bytes = 0

    def _close_idle(self) -> None:
        if not self.transport.is_closing():
            is_unsent = self.transport.get_write_buffer_size() > 0
            self.transport.close()
            self._abort_after(self.body_timeout_s if is_unsent else CLOSE_S)

    def _abort_after(self, seconds: float) -> None:
        """Abort the connection if its client has not read everything until then."""
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(seconds, self._abort, "its time is over")

    def _abort(self, reason: str) -> None:
        if self._answering is not None:
            self._answering.disconnected = True
        if unsent := self.transport.get_write_buffer_size():
            logger.warning("closing a connection with %d unread bytes: %s", unsent, reason)
        self.transport.abort()

    def _count_unread(self) -> None:
        """Count what waits to be read. An answer of any size may wait if no other does."""
        if not self.flow.write_paused:
            return
        self._give_back_unread()
        size = self.transport.get_write_buffer_size()
        if self._address is None or (
            self.unread.taken and not self.unread.fits(self._address, size)
        ):
            self._abort("too many bytes wait to be read")
        else:
            self.unread.take(self._address, size)
            self._unread_bytes = size

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        self._give_back_unread()

    def _give_back_unread(self) -> None:
        if self._address is not None and self._unread_bytes:
            self.unread.give_back(self._address, self._unread_bytes)
            self._unread_bytes = 0
