"""Fetches images by URL: from allowed hosts and public addresses, within size and time limits."""

import asyncio
import ipaddress
import socket

import httpx

from service.errors import InvalidInputError, PayloadTooLargeError
from service.settings import Settings

MAX_REDIRECTS = 3


class ImageFetcher:
    """Fetches encoded images.

    It connects to the very address that it checked, so a host whose name resolves to another
    address a moment later (DNS rebinding) cannot reach an internal one.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._client = httpx.AsyncClient(timeout=settings.url_timeout_s, trust_env=False)

    async def close(self) -> None:
        await self._client.aclose()

    async def fetch(self, url: str) -> bytes:
        """The body of `url`.

        Raises:
            ServiceError: URLs are off; or this one is not allowed, unreachable, too large or slow.
        """
        if not self._settings.url_hosts:
            raise InvalidInputError("image URLs are off here; send the image itself", field="url")
        try:
            async with asyncio.timeout(self._settings.url_timeout_s):
                for _ in range(MAX_REDIRECTS + 1):
                    content, redirect = await self._get(url)
                    if redirect is None:
                        return content
                    url = redirect
                raise InvalidInputError(f"more than {MAX_REDIRECTS} redirects", field="url")
        except (TimeoutError, httpx.TimeoutException) as error:
            raise InvalidInputError(
                "the image's host did not respond in time", field="url"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            raise InvalidInputError("the image could not be fetched", field="url") from error

    async def _get(self, url: str) -> tuple[bytes, str | None]:
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
            if response.is_redirect:
                return b"", str(parsed.join(response.headers["location"]))
            if response.status_code != 200:
                detail = f"the image's host answered {response.status_code}"
                raise InvalidInputError(detail, field="url")
            return await self._read(response), None
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
                parsed = ipaddress.ip_address(address.split("%")[0])
                # ::ffff:10.0.0.1 is the IPv4 address 10.0.0.1
                mapped = getattr(parsed, "ipv4_mapped", None) or parsed
                if not mapped.is_global or mapped.is_multicast:
                    detail = f"{url.host!r} resolves to an address that is not public"
                    raise InvalidInputError(detail, field="url")
        return addresses[0]

    async def _read(self, response: httpx.Response) -> bytes:
        limit = self._settings.max_image_bytes
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > limit:
                raise PayloadTooLargeError(
                    f"the image has more than {limit} bytes, which is the limit"
                )
        return bytes(content)
