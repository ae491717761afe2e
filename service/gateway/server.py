"""The HTTP server of the application."""

import asyncio
import contextlib
import signal
import socket
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.gateway.disconnect import disconnect
from service.gateway.ports import separate_listeners
from service.settings import Settings
from service.tls import server_context

MAX_HEADER_BYTES = 64 * 1024


def create_server(app: FastAPI, settings: Settings) -> uvicorn.Server:
    """A server that finishes its accepted requests on SIGINT or SIGTERM.

    Raises:
        OSError: the certificate or its key cannot be used.
    """

    class Protocol(ImpatientProtocol):
        header_timeout_s = settings.header_timeout_s

    context = server_context(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_context_factory=None if context is None else lambda *_: context,
        timeout_keep_alive=75,  # longer than load balancers', so that they close first
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
    )
    return uvicorn.Server(config)


def run_server(app: FastAPI, settings: Settings, listener: socket.socket | None = None) -> None:
    """Serve until SIGINT or SIGTERM, finish the accepted requests, and return."""
    server = create_server(app, settings)
    # uvicorn drains and then raises the signal again for the handler that was set before it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listeners = list(separate_listeners(settings))
    if listener is None and listeners:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(None if listener is None else [listener, *listeners])


def check_free(host: str, port: int) -> None:
    """Raise OSError if the port is taken, so that a process fails before it starts anything."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()


class ImpatientProtocol(HttpToolsProtocol):
    """Closes connections whose headers are too slow or too long, which uvicorn does not limit, and
    cancels the work of requests whose connection is lost.

    `read_body` limits the time of bodies, uvicorn that of idle keep-alive connections.
    """

    header_timeout_s: float
    _timer: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._timer is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def connection_lost(self, error: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(error)
        if self.cycle is not None and not self.cycle.response_complete:
            disconnect(self.cycle.scope)

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.header_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._header_bytes = 0
