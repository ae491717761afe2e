"""Admin and metrics routes on ports of their own."""

import errno
import re
import socket
from collections.abc import Iterator

from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import NotFoundError
from service.gateway.problems import problem_response
from service.settings import Settings

_ADMIN = re.compile(r"/(v2/repository/)?models/[^/]+/(load|unload)/?|/debug/queues/?")
_METRICS = re.compile(r"/metrics/?")
# On every port, for who checks it.
_HEALTH = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")


class SeparatePorts:
    """Answers 404 to routes that the settings have moved to another port."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._admin = settings.admin_port
        self._metrics = settings.own_metrics_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_here(scope):
            error = NotFoundError(f"{scope['path']} is not on this port")
            await problem_response(error, scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_here(self, scope: Scope) -> bool:
        port, path = (scope.get("server") or ("", 0))[1], scope["path"]
        if path in _HEALTH:
            return True
        if path.endswith("\n"):  # the patterns of routes end with `$`, which matches before it
            return False
        if self._admin and _ADMIN.fullmatch(path):
            return bool(port == self._admin)
        if self._metrics and _METRICS.fullmatch(path):
            return bool(port == self._metrics)
        return not port or port not in (self._admin, self._metrics)


def listeners(host: str, port: int) -> list[socket.socket]:
    """Listening sockets of all addresses of a host that this machine has.

    Raises:
        OSError: the port is taken, or the machine has none of the addresses.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    # a file of hosts may name an address twice
    for family, address in dict.fromkeys((each[0], each[4][:2]) for each in found):
        try:
            sockets.append(socket.create_server(address, family=family, backlog=2048))
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                for each in sockets:
                    each.close()
                raise
            missing = error
    if missing is not None and not sockets:
        raise missing
    return sockets


def separate_listeners(settings: Settings) -> Iterator[socket.socket]:
    """Listening sockets of the ports of their own. Several gateways can share them.

    Raises:
        OSError: a port is taken.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    for port in {settings.admin_port, settings.own_metrics_port} - {0}:
        yield socket.create_server(
            (settings.host, port), family=family, backlog=2048, reuse_port=True
        )
