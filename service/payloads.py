"""JSON objects and base64 text from request bodies.

Parsers hold the interpreter's lock, so that a thread does not help: while a body is parsed, nothing
else runs. What a body holds is therefore counted before it is parsed.
"""

import asyncio
import binascii
import re
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from service.errors import BadRequestError, InvalidInputError, PayloadTooLargeError, ServiceError

# Decoding more than this takes milliseconds, so it is done in a thread.
SLOW_BASE64_CHARACTERS = 256 * 1024
# A thread lets others run between pieces; of four characters each.
BASE64_PIECE = 2**18
# The same of counting JSON text; a thread lets others run between pieces.
SLOW_JSON_BYTES = 2**20
JSON_PIECE_BYTES = 2**18
# How often characters may occur in JSON, wherever they stand: a body at these limits is parsed in
# about 0.1 s. Arrays, objects and strings cost most. Commas bound the numbers, such as those of
# preprocessed images.
MAX_JSON_MARKS = 200_000
MAX_JSON_COMMAS = 1_000_000
MAX_JSON_ESCAPES = 1_000_000
# The time for an integer grows with the square of its digits. What large bodies may hold of them is
# looked for where a number may begin; small ones are parsed in milliseconds whatever they hold.
MAX_DIGITS = 100
LONG_NUMBER = re.compile(rb"[\[,:\s-]\d{%d}" % (MAX_DIGITS + 1))


async def parse_json_object(content: bytes) -> dict[str, Any]:
    """The JSON object of a request body.

    Raises:
        PayloadTooLargeError: too many values, or a large body with a number that is too long.
        InvalidInputError: a string is not Unicode.
        BadRequestError: not JSON, or not an object; NaN and Infinity are not JSON.
    """
    if len(content) <= SLOW_JSON_BYTES:
        _check_json(content)
    else:
        await asyncio.to_thread(_check_json, content)
    fields = _parse(content)
    if not isinstance(fields, dict):
        raise BadRequestError("the JSON body must be an object")
    return fields


def _parse(content: bytes) -> Any:
    try:
        return from_json(content, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        if "surrogate" in str(error) or "hex escape" in str(error):
            raise InvalidInputError("a string has an escape that is not Unicode text") from error
        raise BadRequestError(f"the body is not valid JSON: {error}") from error


def parse_json_lines(content: bytes) -> list[Any]:
    """The value of each line of NDJSON that is not empty; the error of a line that has none.

    Raises:
        PayloadTooLargeError: too many values in all.
    """
    _check_counts(content)
    is_large = len(content) > SLOW_JSON_BYTES
    values: list[Any] = []
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        try:
            if is_large:
                _check_numbers(b"\n" + line)
            values.append(_parse(line))
        except ServiceError as error:
            # Its frames hold the whole body, and this list, which holds the error.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            values.append(error)
    return values


def _check_json(content: bytes) -> None:
    """
    Raises:
        PayloadTooLargeError: too many values, or a large body with a number that is too long.
    """
    _check_counts(content)
    if len(content) > SLOW_JSON_BYTES:
        _check_numbers(content)


def _check_counts(content: bytes) -> None:
    """
    Raises:
        PayloadTooLargeError: too many values.
    """
    marks = commas = escapes = 0
    for piece in _pieces(content):
        marks += sum(piece.count(mark) for mark in (b"[", b"{", b'"'))
        commas += piece.count(b",")
        escapes += piece.count(b"\\")
    if marks > MAX_JSON_MARKS:
        raise PayloadTooLargeError(
            f"the JSON body has {marks} brackets, braces and quotes; the limit is {MAX_JSON_MARKS}"
        )
    if commas > MAX_JSON_COMMAS:
        raise PayloadTooLargeError(
            f"the JSON body has more than {MAX_JSON_COMMAS} values; send tensors as binary data"
        )
    if escapes > MAX_JSON_ESCAPES:
        raise PayloadTooLargeError(f"the JSON body has more than {MAX_JSON_ESCAPES} escapes")


def _check_numbers(content: bytes) -> None:
    """
    Raises:
        PayloadTooLargeError: a number is too long.
    """
    if any(LONG_NUMBER.search(piece) for piece in _pieces(content)):
        raise PayloadTooLargeError(f"the JSON body has a number of over {MAX_DIGITS} digits")


def _pieces(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), JSON_PIECE_BYTES):
        yield content[start : start + JSON_PIECE_BYTES]


def decode_base64(text: str, field: str) -> bytes:
    """The bytes of base64 text, or of a `data:` URI.

    Raises:
        InvalidInputError: not base64; names `field`.
    """
    _, comma, payload = text.partition(",")
    payload = payload if comma else text
    pieces: list[bytes] = []
    try:
        for start in range(0, len(payload), BASE64_PIECE):
            if pieces and len(pieces[-1]) < BASE64_PIECE // 4 * 3:
                raise ValueError("padding before the end")
            piece = payload[start : start + BASE64_PIECE]
            pieces.append(binascii.a2b_base64(piece, strict_mode=True))
    except ValueError as error:
        raise InvalidInputError("base64 does not decode", field=field) from error
    return b"".join(pieces)


async def decode_base64_apart(text: str, field: str) -> bytes:
    """`decode_base64`, in a thread if it takes long."""
    if len(text) <= SLOW_BASE64_CHARACTERS:
        return decode_base64(text, field)
    return await asyncio.to_thread(decode_base64, text, field)
