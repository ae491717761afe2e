"""Accepts connections.

uvloop accepts one connection a turn of the loop: a busy server whose turns are long would let new
clients wait for seconds. And it shows a connection of TLS only after the handshake: those who never
end one would be neither counted nor cut off soon.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any

from service.clients import identify
from service.gateway.refused import RefusedConnections

logger = logging.getLogger(__name__)

# Connections that are accepted in one turn of the loop. Few, because several gateways may accept
# from one socket, and each should get its share of those that arrive together.
MAX_ACCEPTED = 16
# Until the next try, where the process can have no more files.
PAUSE_S = 1.0


class Listener:
    """Accepts the connections of a listening socket on the running event loop, until closed. Has
    the methods of `asyncio.Server` that uvicorn calls."""

    def __init__(
        self,
        listener: socket.socket,
        create_protocol: Callable[[], Any],
        context: ssl.SSLContext | None,
        handshake_timeout_s: float,
        close_timeout_s: float,
    ) -> None:
        """
        Args:
            create_protocol: an `asyncio.Protocol` with two more methods. `count(address)` counts
                the connection, or returns False if there are too many; `give_back()` counts it no
                more.
            context: of TLS; None for plain HTTP.
            close_timeout_s: for a closed connection of TLS, with what was not read of its answer.
        """
        self._listener = listener
        self._create_protocol = create_protocol
        self._context = context
        self._handshake_timeout_s = handshake_timeout_s
        self._close_timeout_s = close_timeout_s
        self._loop = asyncio.get_running_loop()
        self._beginning: set[asyncio.Task[None]] = set()
        self._refused = RefusedConnections()
        self._is_closed = False
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Accept no more connections."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._refused.close()

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
                self._refuse(connection)
                continue
            task = self._loop.create_task(self._begin(connection, protocol))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    def _refuse(self, connection: socket.socket) -> None:
        if self._context is None:
            self._refused.refuse(connection)
        else:
            connection.close()

    async def _begin(self, connection: socket.socket, protocol: Any) -> None:
        """Make the handshake, if any, after which the protocol has the connection."""
        tls: dict[str, Any] = {}
        if self._context is not None:
            tls = {
                "ssl": self._context,
                "ssl_handshake_timeout": self._handshake_timeout_s,
                "ssl_shutdown_timeout": self._close_timeout_s,
            }
        try:
            connection.setblocking(False)
            await self._loop.connect_accepted_socket(lambda: protocol, connection, **tls)
        except Exception as error:
            # an OSError: of TLS, too; and a time that is over
            level = logging.DEBUG if isinstance(error, OSError) else logging.WARNING
            logger.log(level, "a connection could not be begun: %r", error)
            protocol.give_back()
