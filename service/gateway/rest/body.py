"""A request body to encoded images and parameters: multipart, raw, or JSON."""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from models.inputs.types import Input, Video
from service.errors import (
    BadRequestError,
    InvalidInputError,
    PayloadTooLargeError,
    RequestTimeoutError,
    ServiceError,
    UnsupportedMediaTypeError,
)
from service.gateway.fetch import ImageFetcher
from service.parameters import Parameters, list_fields, validate
from service.settings import Settings

P = TypeVar("P", bound=Parameters)

MAX_FIELDS = 2000
MAX_FIELD_BYTES = 64 * 1024
SLOW_JSON_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class ImagesIn(Generic[P]):
    """What a client sent. An input that could not be had stands as its error, in its place."""

    inputs: Sequence[Input | ServiceError]
    parameters: P


@dataclass(frozen=True, slots=True)
class _Body:
    images: Sequence[bytes | Video | ServiceError]
    fields: dict[str, Any]


async def read_images(request: Request, parameters: type[P]) -> ImagesIn[P]:
    """Read the body in whichever of the three ways it came, and validate the parameters.

    Raises:
        ServiceError: malformed, over a limit, too slow, or with wrong parameters.
        starlette.requests.ClientDisconnect: the client left while sending.
    """
    settings: Settings = request.app.state.settings
    lists = list_fields(parameters)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    match content_type.partition("/"):
        case ("multipart", _, "form-data"):
            body = await _read_form(request, settings, lists)
        case ("application", _, "json"):
            body = await _read_json(request, settings)
        case ("application", _, "x-www-form-urlencoded"):
            body = await _read_urlencoded(request, settings, lists)
        case ("video", _, _):
            body = _Body([Video(await read_body(request, settings))], {})
        case ("image", _, _) | ("application", _, "octet-stream") | ("", _, _):
            content = await read_body(request, settings)
            body = _Body([content] if content or content_type else [], {})
        case _:
            raise UnsupportedMediaTypeError(
                f"Content-Type {content_type!r}; send multipart/form-data with parts named "
                "'image', one image as image/* or application/octet-stream, or application/json"
            )
    fields = collect(request.query_params.multi_items(), lists) | body.fields
    validated = validate(parameters, fields)
    given = validated.given()
    if given is not None and body.images:
        what = "texts" if "texts" in type(validated).model_fields else "parameters"
        raise InvalidInputError(f"send images or {what}, not both", field=what)
    if given is None and not body.images:
        raise InvalidInputError("the request holds no image", field="image")
    if len(body.images) > settings.max_images:
        raise PayloadTooLargeError(
            f"{len(body.images)} images in one request; the limit is {settings.max_images}"
        )
    return ImagesIn(body.images if given is None else given, validated)


async def read_body(request: Request, settings: Settings) -> bytes:
    """The whole body, given up as soon as it is known to be too large or too slow."""
    limit = settings.max_request_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise PayloadTooLargeError(f"the body has {declared} bytes; the limit is {limit}")
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > limit:
                    raise PayloadTooLargeError(f"the body has more than {limit} bytes")
    except TimeoutError as error:
        raise RequestTimeoutError(
            f"the body did not arrive within {settings.body_timeout_s:g} s"
        ) from error
    return b"".join(chunks)


async def _read_form(request: Request, settings: Settings, lists: frozenset[str]) -> _Body:
    content = await read_body(request, settings)
    form = await parse_form(request, content, max_files=settings.max_images, max_fields=MAX_FIELDS)
    try:
        return await _sort_parts(form, lists)
    finally:
        await form.close()


async def parse_form(
    request: Request, content: bytes, *, max_files: int, max_fields: int
) -> FormData:
    """The parts of a multipart body that is in memory.

    Raises:
        ServiceError: malformed, or too many parts.
    """
    parser = MultiPartParser(
        request.headers,
        _once(content),
        max_files=max_files,
        max_fields=max_fields,
        max_part_size=MAX_FIELD_BYTES,
    )
    parser.spool_max_size = len(content)  # it is in memory already: never to disk
    try:
        return await parser.parse()
    except MultiPartException as error:
        if error.message.startswith(("Too many", "Part exceeded")):
            raise PayloadTooLargeError(f"multipart body: {error.message}") from error
        raise BadRequestError(f"multipart body: {error.message}") from error
    except (KeyError, UnicodeError, ValueError) as error:
        raise BadRequestError("the multipart body cannot be parsed") from error


async def _read_urlencoded(request: Request, settings: Settings, lists: frozenset[str]) -> _Body:
    """A form without files, as `curl -d texts=...` sends it."""
    content = await read_body(request, settings)
    try:
        fields = parse_qsl(content.decode(), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as error:  # curl names any body so, if not told otherwise
        raise UnsupportedMediaTypeError(
            "the body is no form of texts; send an image as image/* or application/octet-stream"
        ) from error
    return _Body([], collect(fields, lists))


async def _sort_parts(form: FormData, lists: frozenset[str]) -> _Body:
    images: list[bytes | Video | ServiceError] = []
    fields: list[tuple[str, str]] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) and name == "image":
            images.append(await value.read())
        elif isinstance(value, UploadFile) and name == "video":
            images.append(Video(await value.read()))
        elif isinstance(value, UploadFile):
            raise InvalidInputError(
                f"file part {name!r}; parts must be named 'image' or 'video'", field=name
            )
        elif name in ("image", "video"):
            raise InvalidInputError(
                f"part {name!r} has no filename, so it came as text; send it as a file", field=name
            )
        else:
            fields.append((name, value))
    return _Body(images, collect(fields, lists))


async def _read_json(request: Request, settings: Settings) -> _Body:
    content = await read_body(request, settings)
    try:
        if len(content) > SLOW_JSON_BYTES:
            fields = await asyncio.to_thread(json.loads, content)
        else:
            fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequestError("the body is not valid JSON") from error
    if not isinstance(fields, dict):
        raise BadRequestError("the JSON body must be an object")
    items, clips = fields.pop("images", []), fields.pop("videos", [])
    for name, found in (("images", items), ("videos", clips)):
        if not isinstance(found, list):
            raise InvalidInputError(f"{name} must be a list", field=name)
    if len(items) + len(clips) > settings.max_images:
        raise PayloadTooLargeError(
            f"{len(items) + len(clips)} images in one request; the limit is {settings.max_images}"
        )
    fetcher: ImageFetcher = request.app.state.fetcher
    images = await asyncio.gather(*(image_of(item, fetcher) for item in items))
    return _Body([*images, *(video_of(item) for item in clips)], fields)


def video_of(item: Any) -> Video | ServiceError:
    """The encoded clip of `{"base64": ...}`, or why there is none."""
    match item:
        case {"base64": str(text), **rest} if not rest:
            content = _from_base64(text, "videos")
            return content if isinstance(content, ServiceError) else Video(content)
    return InvalidInputError('a video is {"base64": "..."}', field="videos")


def _from_base64(text: str, field: str) -> bytes | ServiceError:
    _, comma, payload = text.partition(",")
    try:
        return base64.b64decode(payload if comma else text, validate=True)
    except (binascii.Error, ValueError):
        return InvalidInputError("base64 does not decode", field=field)


async def image_of(item: Any, fetcher: ImageFetcher) -> bytes | ServiceError:
    """The encoded image of `{"base64": ...}` or `{"url": ...}`, or why there is none."""
    match item:
        case {"base64": str(text), **rest} if not rest:
            return _from_base64(text, "images")
        case {"url": str(url), **rest} if not rest:
            try:
                return await fetcher.fetch(url)
            except ServiceError as error:
                return error
    return InvalidInputError('an image is {"base64": "..."} or {"url": "..."}', field="images")


async def _once(content: bytes) -> AsyncGenerator[bytes, None]:
    yield content


def collect(items: list[tuple[str, str]], lists: frozenset[str]) -> dict[str, Any]:
    """Repeated fields as lists where the parameter is one; elsewhere repeating is an error."""
    fields: dict[str, Any] = {}
    for name, value in items:
        if name in lists:
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise InvalidInputError(f"{name} is given twice", field=name)
        else:
            fields[name] = value
    return fields
