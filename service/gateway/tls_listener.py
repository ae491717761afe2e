"""Accepts TLS connections, which count from the start.

The servers of event loops show a connection only after its TLS handshake: those who never end one
would be neither counted nor cut off soon.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any

from service.clients import identify

logger = logging.getLogger(__name__)

# Connections that are accepted until the event loop has a turn.
MAX_ACCEPTED = 64
# Until the next try, where the process can have no more files.
PAUSE_S = 1.0


class TlsListener:
    """Accepts the connections of a listening socket on the running event loop, until closed. Has
    the methods of `asyncio.Server` that uvicorn calls."""

    def __init__(
        self,
        listener: socket.socket,
        create_protocol: Callable[[], Any],
        context: ssl.SSLContext,
        handshake_timeout_s: float,
        close_timeout_s: float,
    ) -> None:
        """
        Args:
            create_protocol: an `asyncio.Protocol` with two more methods. `count(address)` counts
                the connection, or returns False if there are too many; `give_back()` counts it no
                more.
            close_timeout_s: for a closed connection, with what was not read of its answer.
        """
        self._listener = listener
        self._create_protocol = create_protocol
        self._context = context
        self._handshake_timeout_s = handshake_timeout_s
        self._close_timeout_s = close_timeout_s
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._is_closed = False
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Accept no more connections."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._listener)
            self._listener.close()

    async def wait_closed(self) -> None:
        """Return at once: uvicorn itself waits for its connections."""

    def _listen(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTED):
            try:
                connection, peer = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("cannot accept connections: %s", error)
                self._loop.remove_reader(self._listener)
                self._loop.call_later(PAUSE_S, self._listen)
                return
            protocol = self._create_protocol()
            if not protocol.count(identify(None, peer[0])):
                connection.close()
                continue
            task = self._loop.create_task(self._begin(connection, protocol))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _begin(self, connection: socket.socket, protocol: Any) -> None:
        """Make the handshake, after which the protocol has the connection."""
        try:
            connection.setblocking(False)
            await self._loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=self._handshake_timeout_s,
                ssl_shutdown_timeout=self._close_timeout_s,
            )
        except Exception as error:
            # an OSError: of TLS, too; and a time that is over
            level = logging.DEBUG if isinstance(error, OSError) else logging.WARNING
            logger.log(level, "a TLS handshake failed: %r", error)
            protocol.give_back()
