"""Who sends the current request: an API key, or else an address. Clients take turns."""

import ipaddress
from contextvars import ContextVar
from functools import lru_cache
from urllib.parse import unquote

from service.keys import ApiKey

client: ContextVar[str] = ContextVar("client", default="")

# An IPv6 host can choose any address of its network.
IPV6_NETWORK_BITS = 64


def identify(key: ApiKey | None, address: str) -> str:
    """A client's name in queues: its key's, or else its address.

    Args:
        address: of IPv6 addresses, only the network counts.
    """
    return _host(address) if key is None else f"key {key.id}"


def peer_address(peer: str) -> str:
    """The address of a gRPC peer: `ipv4:HOST:PORT`, `ipv6:%5BHOST%5D:PORT` or `unix:PATH`."""
    return unquote(peer).partition(":")[2].rpartition(":")[0] or peer


@lru_cache(maxsize=1024)
def _host(address: str) -> str:
    try:
        host = ipaddress.ip_address(address.strip("[]"))
    except ValueError:  # a Unix socket's path
        return address
    if host.version == 4:
        return str(host)
    if host.ipv4_mapped:
        return str(host.ipv4_mapped)
    return str(ipaddress.ip_network((host, IPV6_NETWORK_BITS), strict=False))
