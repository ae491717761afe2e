"""A request body to an `InferRequest` and its parameters: multipart, raw, form or JSON."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from models.inputs.types import Video
from models.tasks.table import get_task
from service.errors import (
    BadRequestError,
    InvalidInputError,
    PayloadTooLargeError,
    ServiceError,
    UnsupportedMediaTypeError,
)
from service.gateway.dispatch import read_deadline, read_priority
from service.gateway.fetch import Fetch, ImageFetcher
from service.gateway.rest.content import read_body, share_of
from service.limits import Share, check_input_count
from service.parameters import HOW_TO_SEND, Parameters, TaskParameters, list_fields, validate
from service.payloads import decode_base64_apart, parse_json_object
from service.settings import Settings
from service.types import InferRequest

P = TypeVar("P", bound=Parameters)

MAX_FIELDS = 2000
MAX_FIELD_BYTES = 64 * 1024
MAX_URLENCODED_BYTES = 4 * 2**20
# Of a form, so many bytes are parsed at once, and for so long until the event loop has a turn.
FORM_PIECE_BYTES = 2**16
FORM_TURN_S = 0.005
# Spaces after a boundary.
MAX_PADDING = 64


@dataclass(frozen=True, slots=True)
class _Body:
    """The inputs and the parameters of a body. An input that could not be read is its error."""

    inputs: Sequence[bytes | Video | ServiceError]
    fields: dict[str, Any]


async def read_request(
    request: Request, parameters: type[P], content: bytes | None = None
) -> tuple[P, InferRequest]:
    """Parse and validate a whole request: its headers first, then its body and query.

    Args:
        content: the body, if it has been read.

    Raises:
        ServiceError: malformed, over a limit, too slow, or with invalid parameters.
        ClientDisconnect: the client disconnected before the end of the body.
    """
    deadline, bulk = read_deadline(request), read_priority(request)
    lists = list_fields(parameters)
    if content is None:
        content = await read_body(request)
    body = await _parse_body(request, content, lists, deadline)
    fields = _accepted_form(request, parameters)
    fields |= collect(request.query_params.multi_items(), lists) | body.fields
    validated = validate(parameters, fields)
    inputs = validated.inputs()
    if inputs is None and not body.inputs:
        raise InvalidInputError(f"the request holds no image; {HOW_TO_SEND}", field="image")
    if inputs is not None and body.inputs:
        [name, *others] = sorted(validated.input_fields)
        field = "parameters" if others else name
        raise InvalidInputError(f"send images or {field}, not both", field=field)
    check_input_count(request.app.state.settings, len(body.inputs))
    return validated, InferRequest(
        inputs=body.inputs if inputs is None else inputs,
        calls=validated.calls(),
        deadline=deadline,
        bulk=bulk,
    )


def _accepted_form(request: Request, parameters: type[Parameters]) -> dict[str, Any]:
    """The option `output` that the `Accept` header stands for, if the task has one."""
    if not issubclass(parameters, TaskParameters):
        return {}
    accept = request.headers.get("accept", "")
    for body in get_task(parameters.task).bodies:
        if body.form is not None and body.media_type in accept:
            return {"output": body.form}
    return {}


async def parse_form(
    headers: Headers, content: bytes, *, max_files: int, max_fields: int
) -> FormData:
    """The parts of a multipart body.

    Raises:
        ServiceError: malformed, or too many parts.
    """

    async def stream() -> AsyncGenerator[bytes, None]:
        began = time.monotonic()
        for start in range(0, len(content), FORM_PIECE_BYTES):
            yield content[start : start + FORM_PIECE_BYTES]
            if time.monotonic() > began + FORM_TURN_S:
                await asyncio.sleep(0)
                began = time.monotonic()

    _, options = parse_options_header(headers["content-type"])
    # With other codecs, text can hold what is not Unicode.
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise UnsupportedMediaTypeError("a multipart body's charset can only be utf-8")
    boundary = b"\r\n--" + options.get(b"boundary", b"")
    most = max_files + max_fields + 1
    if len(content) <= FORM_PIECE_BYTES:
        _check_boundaries(content, boundary, most)
    else:
        await asyncio.to_thread(_check_boundaries, content, boundary, most)
    parser = MultiPartParser(
        headers,
        stream(),
        max_files=max_files,
        max_fields=max_fields,
        max_part_size=MAX_FIELD_BYTES,
    )
    parser.spool_max_size = len(content)  # keeps parts in memory, where the body is anyway
    try:
        return await parser.parse()
    except MultiPartException as error:
        if error.message.startswith(("Too many", "Part exceeded")):
            raise PayloadTooLargeError(f"multipart body: {error.message}") from error
        raise BadRequestError(f"multipart body: {error.message}") from error
    except (KeyError, UnicodeError, ValueError) as error:
        raise BadRequestError("the multipart body cannot be parsed") from error


def _check_boundaries(content: bytes, boundary: bytes, most: int) -> None:
    """Check what looks like a boundary of a form, which takes the parser as long as one, wherever
    it stands; and the spaces that may follow it, each of which takes it as long.

    Raises:
        PayloadTooLargeError: there are too many.
    """
    count = 0
    for start in range(0, len(content), FORM_PIECE_BYTES):
        end = start + FORM_PIECE_BYTES + len(boundary) - 1  # those that begin in the piece
        count += content.count(boundary, start, end)
    if count > most:
        raise PayloadTooLargeError(f"multipart body: {count} boundaries are too many")
    padding = re.escape(boundary[2:]) + rb"[ \t]{%d}" % MAX_PADDING
    if any(
        re.search(padding, content[start : start + FORM_PIECE_BYTES + len(boundary) + MAX_PADDING])
        for start in range(0, len(content), FORM_PIECE_BYTES)
    ):
        raise PayloadTooLargeError("multipart body: too many spaces after a boundary")


async def load_image(item: Any, fetch: Fetch) -> bytes | ServiceError:
    """The encoded image of `{"base64": ...}` or `{"url": ...}`, or the error of reading it."""
    try:
        match item:
            case {"base64": str(text), **rest} if not rest:
                return await decode_base64_apart(text, "images")
            case {"url": str(url), **rest} if not rest:
                return await fetch(url)
    except ServiceError as error:
        return error.kept()
    return InvalidInputError('an image is {"base64": "..."} or {"url": "..."}', field="images")


def collect(items: list[tuple[str, str]], lists: frozenset[str]) -> dict[str, Any]:
    """Form or query fields by name; those of `lists` may be repeated.

    Raises:
        InvalidInputError: another field is repeated, or a list is written as JSON, which would be
            one text.
    """
    fields: dict[str, Any] = {}
    for name, value in items:
        if name in lists:
            if value.startswith(('["', "['")) and value.endswith(('"]', "']")):
                raise InvalidInputError(
                    f"{name} is a list in brackets, which would be one text; repeat the field for "
                    "each element, or send the request as JSON",
                    field=name,
                )
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise InvalidInputError(f"{name} is given twice", field=name)
        else:
            fields[name] = value
    return fields


async def _parse_body(
    request: Request, content: bytes, lists: frozenset[str], deadline: float
) -> _Body:
    settings: Settings = request.app.state.settings
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    match content_type.partition("/"):
        case ("multipart", _, "form-data"):
            return await _parse_multipart(request.headers, content, settings, lists)
        case ("application", _, "json"):
            fetcher: ImageFetcher = request.app.state.fetcher
            fetch = fetcher.for_request(request, deadline)
            return await _parse_json(content, settings, fetch, share_of(request))
        case ("application", _, "x-www-form-urlencoded"):
            return await asyncio.to_thread(_parse_urlencoded, content, lists)
        case ("video", _, _):
            return _Body([Video(content)], {})
        case ("image", _, _) | ("application", _, "octet-stream") | ("", _, _):
            return _Body([content] if content or content_type else [], {})
    raise UnsupportedMediaTypeError(
        f"Content-Type {content_type!r}; send multipart/form-data with parts named "
        "'image', one image as image/* or application/octet-stream, or application/json"
    )


async def _parse_multipart(
    headers: Headers, content: bytes, settings: Settings, lists: frozenset[str]
) -> _Body:
    form = await parse_form(headers, content, max_files=settings.max_images, max_fields=MAX_FIELDS)
    inputs: list[bytes | Video | ServiceError] = []
    fields: list[tuple[str, str]] = []
    try:
        for name, value in form.multi_items():
            match name, value:
                case "image", UploadFile():
                    inputs.append(await value.read())
                case "video", UploadFile():
                    inputs.append(Video(await value.read()))
                case _, UploadFile():
                    raise InvalidInputError(
                        f"file part {name!r}; parts must be named 'image' or 'video'", field=name
                    )
                case (("image" | "video"), _):
                    raise InvalidInputError(
                        f"part {name!r} has no filename and so is text; send it as a file "
                        f"(curl -F {name}=@FILE)",
                        field=name,
                    )
                case _, str():
                    fields.append((name, value))
    finally:
        await form.close()
    return _Body(inputs, collect(fields, lists))


def _parse_urlencoded(content: bytes, lists: frozenset[str]) -> _Body:
    """A form without files, as `curl -d texts=...` sends it."""
    if len(content) > MAX_URLENCODED_BYTES:
        raise PayloadTooLargeError(
            f"the form has {len(content)} bytes; the limit without files is {MAX_URLENCODED_BYTES}"
        )
    try:
        fields = parse_qsl(content.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as error:  # curl's default Content-Type, which it also gives to images
        raise UnsupportedMediaTypeError(
            "the body is not a form of texts; send an image as image/* or application/octet-stream"
        ) from error
    return _Body([], collect(fields, lists))


async def _parse_json(content: bytes, settings: Settings, fetch: Fetch, share: Share) -> _Body:
    fields = await parse_json_object(content, share)
    images, videos = fields.pop("images", []), fields.pop("videos", [])
    for name, items in (("images", images), ("videos", videos)):
        if not isinstance(items, list):
            raise InvalidInputError(f"{name} must be a list", field=name)
    check_input_count(settings, len(images) + len(videos))  # before any URL is fetched
    encoded = await asyncio.gather(*(load_image(item, fetch) for item in images))
    clips = [await _decode_video(item) for item in videos]
    share.give_back_made(2 * len(content))  # what was decoded takes no more than the body did
    return _Body([*encoded, *clips], fields)


async def _decode_video(item: Any) -> Video | ServiceError:
    """The encoded clip of `{"base64": ...}`, or the error of reading it."""
    try:
        match item:
            case {"base64": str(text), **rest} if not rest:
                return Video(await decode_base64_apart(text, "videos"))
    except ServiceError as error:
        return error.kept()
    return InvalidInputError('a video is {"base64": "..."}', field="videos")
