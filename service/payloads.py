"""JSON objects and base64 text from request bodies.

Parsers hold the interpreter's lock, so that a thread does not help: while a body is parsed, nothing
else runs. What a body holds is therefore counted before it is parsed. Bodies that take long are
parsed one at a time, and clients take turns: between two of them other work has its turn.
"""

import asyncio
import binascii
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic_core import from_json

from service.errors import BadRequestError, InvalidInputError, PayloadTooLargeError, ServiceError
from service.limits import Share

# Decoding more than this takes milliseconds, so it is done in a thread.
SLOW_BASE64_CHARACTERS = 256 * 1024
# A thread lets others run between pieces; of four characters each.
BASE64_PIECE = 2**18
# JSON text that is larger, or of which more is made, is counted and parsed in a thread of its own.
# The thread lets others run between the pieces that it counts.
SLOW_JSON_BYTES = 2**20
SLOW_JSON_MADE_BYTES = 3 * 2**20
PARSER = ThreadPoolExecutor(1, "json")
JSON_PIECE_BYTES = 2**18
# How often characters may occur in JSON, wherever they stand: a body at these limits is parsed in
# about 0.1 s. Arrays, objects and strings cost most. Commas bound the numbers, such as those of
# preprocessed images.
MAX_JSON_MARKS = 200_000
MAX_JSON_COMMAS = 1_000_000
MAX_JSON_ESCAPES = 1_000_000
# A string with one character beyond Latin-1 takes up to four bytes for each of its characters, and
# some five times the time. Of large bodies, such strings may have so many bytes together.
MAX_JSON_WIDE_BYTES = 16 * 2**20
WIDE_ESCAPE = re.compile(rb"\\u(?:[^0]|.[^0])")
# The most memory of what a bracket, a brace or a quote begins or ends, and of a value in a list.
MARK_BYTES = 100
COMMA_BYTES = 40
# The time for an integer grows with the square of its digits. What large bodies may hold of them is
# looked for where a number may begin; small ones are parsed in milliseconds whatever they hold.
MAX_DIGITS = 100
LONG_NUMBER = re.compile(rb"[\[,:\s-]\d{%d}" % (MAX_DIGITS + 1))
# What is searched for first, many times faster.
ENOUGH_DIGITS = b"0" * (MAX_DIGITS + 1)
DIGITS_AS_0 = bytes.maketrans(b"0123456789", b"0" * 10)

T = TypeVar("T")


async def parse_json_object(content: bytes, share: Share) -> dict[str, Any]:
    """The JSON object of a request body.

    Args:
        share: of the request; what the object takes is counted in it: as many bytes as the body has
            for strings, as many for what base64 in them decodes to, and some for its values.

    Raises:
        PayloadTooLargeError: too many values or wide strings, or a large body with a number that is
            too long; or too much memory.
        UnavailableError: all requests together hold too many bytes.
        InvalidInputError: a string is not Unicode.
        BadRequestError: not JSON, or not an object; NaN and Infinity are not JSON.
    """
    fields = await _counted(_count_object, _parse, content, share)
    if not isinstance(fields, dict):
        raise BadRequestError("the JSON body must be an object")
    return fields


async def parse_json_lines(content: bytes, share: Share) -> list[Any]:
    """The value of each line of NDJSON that is not empty; the error of a line that has none.

    Raises:
        PayloadTooLargeError: too many values or wide strings in all, or too much memory.
        UnavailableError: all requests together hold too many bytes.
    """
    return await _counted(_count, _parse_lines, content, share)


async def _counted(
    count: Callable[[bytes], int], parse: Callable[[bytes], T], content: bytes, share: Share
) -> T:
    """`parse(content)`, once it is known what that takes."""
    if len(content) <= SLOW_JSON_BYTES and (size := count(content)) <= SLOW_JSON_MADE_BYTES:
        share.make(size)
        return parse(content)
    async with share.parsing():
        share.make(await share.in_pool(PARSER, count, content))
        return await share.in_pool(PARSER, parse, content)


def _parse(content: bytes) -> Any:
    try:
        return from_json(content, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        if "surrogate" in str(error) or "hex escape" in str(error):
            raise InvalidInputError("a string has an escape that is not Unicode text") from error
        raise BadRequestError(f"the body is not valid JSON: {error}") from error


def _parse_lines(content: bytes) -> list[Any]:
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
            values.append(error.kept())
    return values


def _count_object(content: bytes) -> int:
    """As `_count`, for a body that is one value.

    Raises:
        PayloadTooLargeError: also a large body with a number that is too long.
    """
    size = _count(content)
    if len(content) > SLOW_JSON_BYTES:
        _check_numbers(content)
    return size


def _count(content: bytes) -> int:
    """The most bytes that are made of a body: its values, and what base64 in strings decodes to.

    Raises:
        PayloadTooLargeError: too many values, or too many bytes of wide strings.
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
    wide = _wide_bytes(content)
    if wide > MAX_JSON_WIDE_BYTES:
        raise PayloadTooLargeError(
            f"the JSON body has {wide} bytes of strings that are not ASCII; the limit is "
            f"{MAX_JSON_WIDE_BYTES}"
        )
    return 2 * len(content) + 3 * wide + MARK_BYTES * marks + COMMA_BYTES * commas


def _wide_bytes(content: bytes) -> int:
    """The bytes of strings that may take more than a byte for each of theirs; of a small body with
    such a string, all."""
    if not _is_wide(content):
        return 0
    if len(content) <= SLOW_JSON_BYTES:
        return len(content)
    return sum(len(text) for text in _strings(content) if _is_wide(text))


def _is_wide(text: bytes) -> bool:
    if not text.isascii():
        return True
    return b"\\" in text and any(WIDE_ESCAPE.search(piece) for piece in _pieces(text, 3))


def _strings(content: bytes) -> Iterator[bytes]:
    """The text of each JSON string, without its quotes. Without an end it is the rest of its line:
    no string holds a newline, and lines of NDJSON are parsed apart."""
    start, line_end = content.find(b'"') + 1, 0
    while start:
        if line_end < start:
            line_end = content.find(b"\n", start)
            line_end = len(content) if line_end < 0 else line_end
        end = content.find(b'"', start, line_end)
        while end >= 0 and _is_escaped(content, end):
            end = content.find(b'"', end + 1, line_end)
        end = line_end if end < 0 else end
        yield content[start:end]
        start = content.find(b'"', end + 1) + 1


def _is_escaped(content: bytes, place: int) -> bool:
    """Whether an odd number of backslashes is before a place."""
    first = place
    while content[first - 1 : first] == b"\\":
        first -= 1
    return (place - first) % 2 == 1


def _check_numbers(content: bytes) -> None:
    """
    Raises:
        PayloadTooLargeError: a number is too long.
    """
    if any(
        ENOUGH_DIGITS in piece.translate(DIGITS_AS_0) and LONG_NUMBER.search(piece)
        for piece in _pieces(content)
    ):
        raise PayloadTooLargeError(f"the JSON body has a number of over {MAX_DIGITS} digits")


def _pieces(content: bytes, further: int = 0) -> Iterator[bytes]:
    """Pieces of a body, each with some further bytes of the next one."""
    for start in range(0, len(content), JSON_PIECE_BYTES):
        yield content[start : start + JSON_PIECE_BYTES + further]


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
