"""Answers connections that are beyond the limit."""

import asyncio
import contextlib
import json
import socket

from service.errors import ServiceError, UnavailableError

# A connection that is closed while bytes arrive is reset, and its client may lose the answer. So
# they are read and dropped for a while, of that many connections.
MAX_READ = 256
READ_S = 1.0
READ_BYTES = 64 * 1024


def problem(error: type[ServiceError], detail: str) -> bytes:
    """The body of a refusal that is made before the application is asked."""
    body = {
        "type": f"urn:vitrail:problem:{error.slug}",
        "title": error.title,
        "status": error.status,
        "detail": detail,
    }
    return json.dumps(body).encode()


_PROBLEM = problem(UnavailableError, "too many connections")
_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/problem+json\r\n"
    b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
    % (len(_PROBLEM), _PROBLEM)
)


class RefusedConnections:
    """Connections of plain HTTP that were answered with 503, until their clients close them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._timers: dict[socket.socket, asyncio.TimerHandle] = {}

    def refuse(self, connection: socket.socket) -> None:
        """Answer a connection that was just accepted, and close it in the end."""
        connection.setblocking(False)
        with contextlib.suppress(OSError):  # it is closed already
            connection.send(_ANSWER)
            connection.shutdown(socket.SHUT_WR)
        if len(self._timers) >= MAX_READ:
            connection.close()
            return
        self._timers[connection] = self._loop.call_later(READ_S, self._close, connection)
        self._loop.add_reader(connection, self._read, connection)

    def close(self) -> None:
        """Close what is left."""
        for connection in list(self._timers):
            self._close(connection)

    def _read(self, connection: socket.socket) -> None:
        try:
            is_open = bool(connection.recv(READ_BYTES))
        except BlockingIOError:
            return
        except OSError:
            is_open = False
        if not is_open:
            self._close(connection)

    def _close(self, connection: socket.socket) -> None:
        self._timers.pop(connection).cancel()
        self._loop.remove_reader(connection)
        connection.close()
