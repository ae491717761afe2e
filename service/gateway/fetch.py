"""Fetches images by URL: from allowed hosts and public addresses, within size and time limits."""

import asyncio
import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial

import httpx
from fastapi import Request

from service.errors import InvalidInputError, PayloadTooLargeError
from service.gateway.rest.content import share_of
from service.limits import Share
from service.settings import Settings

MAX_REDIRECTS = 3
# Networks whose addresses hold an IPv4 address in their last 32 bits, to which they are routed:
# NAT64 (RFC 6052) and the old IPv4-compatible ones (RFC 4291).
_EMBEDDING = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("::/96"))

# NAT64 with prefixes of a network's own (RFC 8215).
_LOCAL = ipaddress.IPv6Network("64:ff9b:1::/48")

# Fetches the image of a URL for one request.
Fetch = Callable[[str], Awaitable[bytes]]


class ImageFetcher:
    """Fetches encoded images.

    It connects to the very address that it checked, so a host whose name resolves to another
    address a moment later (DNS rebinding) cannot reach an internal one.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = httpx.AsyncClient(
            timeout=settings.url_timeout_s,
            trust_env=False,
            headers={"Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        await self._client.aclose()

    def for_request(self, request: Request, deadline: float) -> Fetch:
        """`fetch` for a request with a deadline in `time.monotonic` seconds."""
        share = share_of(request)
        return partial(self.fetch, share=share, deadline=deadline)

    async def fetch(self, url: str, *, share: Share, deadline: float) -> bytes:
        """The body of `url`.

        Args:
            share: where its bytes are counted, with those of the request's body.
            deadline: in `time.monotonic` seconds.

        Raises:
            ServiceError: URLs are off; or this one is not allowed, unreachable, too large or slow.
        """
        if not self._settings.url_hosts:
            raise InvalidInputError("image URLs are off here; send the image itself", field="url")
        try:
            seconds = min(self._settings.url_timeout_s, deadline - time.monotonic())
            async with asyncio.timeout(seconds):
                for _ in range(MAX_REDIRECTS + 1):
                    content, redirect = await self._get(url, share)
                    if redirect is None:
                        return content
                    url = redirect
                raise InvalidInputError(f"more than {MAX_REDIRECTS} redirects", field="url")
        except (TimeoutError, httpx.TimeoutException) as error:
            raise InvalidInputError(
                "the image's host did not respond in time", field="url"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError, OverflowError) as error:
            raise InvalidInputError("the image could not be fetched", field="url") from error

    async def _get(self, url: str, share: Share) -> tuple[bytes, str | None]:
        parsed = httpx.URL(url)
        address = await self._allowed_address(parsed)
        request = self._client.build_request(
            "GET",
            parsed.copy_with(host=address),
            headers={"Host": parsed.netloc.decode()},
            extensions={"sni_hostname": parsed.host},
        )
        response = await self._client.send(request, stream=True)
        try:
            if response.has_redirect_location:
                return b"", str(parsed.join(response.headers["location"]))
            if response.status_code != 200:
                detail = f"the image's host answered {response.status_code}"
                raise InvalidInputError(detail, field="url")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise InvalidInputError("the image's host sent it compressed", field="url")
            return await self._read(response, share), None
        finally:
            await response.aclose()

    async def _allowed_address(self, url: httpx.URL) -> str:
        """An address of an allowed host, all of whose addresses are public."""
        if url.scheme not in ("http", "https") or url.userinfo:
            raise InvalidInputError("image URLs must be plain http or https", field="url")
        if url.host not in self._settings.url_hosts:
            raise InvalidInputError(f"images may not be fetched from {url.host!r}", field="url")
        port = url.port or (443 if url.scheme == "https" else 80)
        loop = asyncio.get_running_loop()
        resolved = await loop.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in resolved]
        if not self._settings.url_allow_private:
            for address in addresses:
                if not is_public(address):
                    detail = f"{url.host!r} resolves to an address that is not public"
                    raise InvalidInputError(detail, field="url")
        return addresses[0]

    async def _read(self, response: httpx.Response, share: Share) -> bytes:
        limit = self._settings.max_image_bytes
        content = bytearray()
        async for chunk in response.aiter_raw():
            share.add(len(chunk))
            content += chunk
            if len(content) > limit:
                raise PayloadTooLargeError(
                    f"the image has more than {limit} bytes, which is the limit"
                )
        return bytes(content)


def is_public(address: str) -> bool:
    """Whether an address, and every IPv4 address that it leads to, is on the public internet."""
    parsed = ipaddress.ip_address(address.split("%")[0])
    if not parsed.is_global or parsed.is_multicast:
        # ::ffff:8.8.8.8 is the IPv4 address 8.8.8.8
        mapped = getattr(parsed, "ipv4_mapped", None)
        return mapped is not None and is_public(str(mapped))
    if isinstance(parsed, ipaddress.IPv4Address):
        return True
    if parsed in _LOCAL:
        return False
    inner = [parsed.sixtofour, *(parsed.teredo or ())]
    if any(parsed in network for network in _EMBEDDING):
        inner.append(ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF))
    return all(is_public(str(each)) for each in inner if each is not None)
