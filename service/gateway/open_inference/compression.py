"""Compression of responses, as Triton's clients may ask for it."""

import asyncio
import gzip
import zlib
from collections.abc import Callable
from functools import partial

from fastapi import Response

# Smaller responses are not worth it.
LEAST_BYTES = 1024
LEVEL = 1
ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": partial(gzip.compress, compresslevel=LEVEL),
    "deflate": partial(zlib.compress, level=LEVEL),
}


async def compressed(response: Response, accepted: str) -> Response:
    """The response, compressed if the client accepts it.

    Args:
        accepted: the header `Accept-Encoding`.
    """
    names = [part.strip().partition(";") for part in accepted.lower().split(",")]
    encoding = next(
        (name for name, _, weight in names if name in ENCODERS and weight.strip() != "q=0"), None
    )
    if encoding is None or len(response.body) < LEAST_BYTES:
        return response
    response.body = await asyncio.to_thread(ENCODERS[encoding], bytes(response.body))
    response.headers["Content-Encoding"] = encoding
    response.headers["Content-Length"] = str(len(response.body))
    response.headers["Vary"] = "Accept-Encoding"
    return response
