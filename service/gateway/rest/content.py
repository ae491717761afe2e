"""A request's whole body, as bytes or JSON: within its limits, in time, and without compression."""

import asyncio
import zlib
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import Request

from service.errors import (
    BadRequestError,
    InvalidInputError,
    PayloadTooLargeError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from service.gateway.disconnect import cancelled_by_disconnect
from service.gateway.dispatch import read_deadline
from service.limits import Share
from service.payloads import parse_json_object
from service.settings import Settings

ENCODINGS = ("gzip", "deflate")
# The event loop runs between pieces of a body.
PIECE_BYTES = 2**20
# Copying more than this takes milliseconds, so it is done in a thread.
SLOW_BYTES = 4 * 2**20


async def read_body(request: Request) -> bytes:
    """The whole body, without its `Content-Encoding`: gzip or deflate. The wait for its turn to be
    parsed ends at the request's deadline, and when the client disconnects.

    Raises:
        UnsupportedMediaTypeError: another encoding.
        BadRequestError: it is not encoded so.
        PayloadTooLargeError: as soon as it is known to be larger than the limit.
        RequestTimeoutError: it did not arrive in time.
        UnavailableError: the bodies of all requests are too large together.
        ClientDisconnect: the client disconnected.
    """
    settings: Settings = request.app.state.settings
    share = share_of(request)
    with suppress(InvalidInputError):  # routes with a deadline refuse the header themselves
        share.deadline = read_deadline(request)
    share.while_connected = partial(cancelled_by_disconnect, request.scope)
    limit = settings.max_request_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise PayloadTooLargeError(f"the body has {declared} bytes; the limit is {limit}")
    content = await _receive(request, settings.body_timeout_s)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        return content
    if encoding not in ENCODINGS:
        raise UnsupportedMediaTypeError(f"Content-Encoding {encoding!r}; send gzip or deflate")
    return await _inflate(content, share)


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object that is the whole body.

    Raises:
        ServiceError: as `read_body` and `parse_json_object`.
        ClientDisconnect: the client disconnected.
    """
    content, share = await read_body(request), share_of(request)
    fields = await parse_json_object(content, share)
    share.give_back_made(len(content))  # of the body, which is not kept
    return fields


def share_of(request: Request) -> Share:
    """What a request holds of the budget."""
    share: Share = request.scope["state"]["share"]
    return share


async def _receive(request: Request, timeout_s: float) -> bytes:
    share = share_of(request)
    chunks: list[bytes] = []
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                share.add(len(chunk))
                chunks.append(chunk)
    except TimeoutError as error:
        raise RequestTimeoutError(f"the body did not arrive within {timeout_s:g} s") from error
    if share.bytes <= SLOW_BYTES:
        return b"".join(chunks)
    return await share.in_thread(b"".join, chunks)


async def _inflate(content: bytes, share: Share) -> bytes:
    """A compressed body's content, of which each piece is counted before the next one is made."""
    decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip's header, or zlib's
    pieces: list[bytes] = []
    try:
        while not decoder.eof and (
            piece := await share.in_thread(
                decoder.decompress, decoder.unconsumed_tail if pieces else content, PIECE_BYTES
            )
        ):
            share.add(len(piece))
            pieces.append(piece)
    except zlib.error as error:
        raise BadRequestError("the body is not gzip or deflate, as its header says") from error
    if not decoder.eof or decoder.unused_data:
        raise BadRequestError("the compressed body is cut short, or something follows it")
    return b"".join(pieces)
