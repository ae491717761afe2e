"""Addresses of workers: fixed ones, and those that a DNS name currently resolves to."""

import asyncio
import logging
import socket
from collections.abc import Sequence

logger = logging.getLogger(__name__)

DNS = "dns:///"


class Discovery:
    """Resolves a gateway's list of workers: `host:port`, `unix:path`, `dns:///name:port`."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._targets = targets
        self._last: dict[str, list[str]] = {}
        # The names behind addresses that were resolved, which certificates are for.
        self.names: dict[str, str] = {}

    @property
    def changes(self) -> bool:
        """Whether resolving again may give other addresses."""
        return any(target.startswith(DNS) for target in self._targets)

    async def addresses(self) -> list[str]:
        """Every worker's address. A name that does not resolve keeps its last addresses."""
        addresses: list[str] = []
        for target in self._targets:
            if target.startswith(DNS):
                addresses += await self._resolve(target)
            else:
                addresses.append(target)
        return list(dict.fromkeys(addresses))

    async def _resolve(self, target: str) -> list[str]:
        name, _, port = target.removeprefix(DNS).rpartition(":")
        try:
            loop = asyncio.get_running_loop()
            infos = await loop.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            logger.warning("%s does not resolve: %s", target, error)
            return self._last.get(target, [])
        hosts = sorted({str(address[0]) for *_, address in infos})
        self._last[target] = [
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts
        ]
        self.names |= dict.fromkeys(self._last[target], name)
        return self._last[target]
