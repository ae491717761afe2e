"""The HTTP server of the application."""

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import STARTUP_FAILURE

from service.backend import Backend
from service.garbage import leave_out_old_objects
from service.gateway.listener import Listener
from service.gateway.loop_turns import LoopTurns
from service.gateway.ports import listeners, separate_listeners
from service.gateway.protocol import ImpatientProtocol
from service.gateway.shedding import Shedding
from service.holdings import Holdings
from service.settings import Settings
from service.tls import server_context

logger = logging.getLogger(__name__)

POLL_S = 0.1


def create_server(app: FastAPI, settings: Settings) -> "DrainingServer":
    """A server that finishes its accepted requests on SIGINT or SIGTERM.

    Raises:
        OSError: the certificate or its key cannot be used.
    """

    class Protocol(ImpatientProtocol):
        header_timeout_s = settings.header_timeout_s
        body_timeout_s = settings.body_timeout_s
        held = Holdings(settings.max_connections)
        unread = Holdings(settings.max_bytes_in_flight)
        turns = LoopTurns()
        shedding = Shedding(held, turns, app.state.metrics)

    context = server_context(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Protocol,
        ws="none",  # nothing here speaks it, and `Protocol` would lose sight of the connection
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,  # longer than load balancers', so that they close first
        timeout_graceful_shutdown=int(settings.drain_timeout_s),
    )
    return DrainingServer(config, app.state.backend, settings, app.state.stop_beside, context)


def run_server(
    app: FastAPI,
    settings: Settings,
    listener: socket.socket | None = None,
    *,
    supervised: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM, finish the accepted requests, and return.

    Args:
        supervised: see `DrainingServer.supervised`.
    """
    server = create_server(app, settings)
    server.supervised = supervised
    # uvicorn drains and then raises the signal again for the handler that was set before it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sockets = listeners(settings.host, settings.port) if listener is None else [listener]
    sockets += separate_listeners(settings)
    leave_out_old_objects()
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets)


class DrainingServer(uvicorn.Server):
    """Reports that it is not ready for a while before it stops listening. Then HTTP and gRPC finish
    their accepted requests at the same time. A second signal ends the waiting for both.

    Attributes:
        supervised: leave a second signal to the supervisor, which kills its children then. One stop
            may send them several: an init's, the supervisor's, and one when the supervisor ends.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        backend: Backend,
        settings: Settings,
        stop_beside: Callable[[float], Awaitable[None]] | None,
        context: ssl.SSLContext | None,
    ) -> None:
        super().__init__(config)
        self._context = context
        self._backend = backend
        self._settings = settings
        self._stop_beside = stop_beside
        self.supervised = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's for listening sockets, but with `Listener`."""
        assert sockets is not None
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        protocol: Any = self.config.http_protocol_class
        create_protocol = partial(
            protocol,
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        timeouts_s = (self._settings.header_timeout_s, self._settings.body_timeout_s)
        servers: list[Any] = [
            Listener(each, create_protocol, self._context, *timeouts_s) for each in sockets
        ]
        self.servers = servers
        for each in sockets:
            logger.info("HTTP on %s, port %d", *each.getsockname()[:2])
        self.started = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        is_second = self.should_exit
        super().handle_exit(sig, frame)
        self.force_exit = is_second and not self.supervised  # uvicorn does so for SIGINT alone

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._backend.drain()
        # Clients that keep connections open are told, or the end would meet some between requests.
        self.server_state.default_headers = [
            *self.server_state.default_headers,
            (b"connection", b"close"),
        ]
        delay_s, began = self._settings.drain_delay_s, time.monotonic()
        while time.monotonic() < began + delay_s and not self.force_exit:  # noqa: ASYNC110
            await asyncio.sleep(min(POLL_S, delay_s))
        beside = [asyncio.create_task(self._cut_at_second_signal())]
        if self._stop_beside is not None:
            beside.append(asyncio.ensure_future(self._stop_beside(self._settings.drain_timeout_s)))
        try:
            await super().shutdown(sockets)
            await self.lifespan.shutdown()  # which uvicorn leaves out after a second signal
        finally:
            beside[0].cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _cut_at_second_signal(self) -> None:
        while not self.force_exit:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        for task in self.server_state.tasks:
            task.cancel()
        if self._stop_beside is not None:
            await self._stop_beside(0)
