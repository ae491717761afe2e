"""The bodies of collections' routes: images with ids and metadata, and a query."""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Request
from starlette.datastructures import UploadFile

from service.errors import (
    BadRequestError,
    InvalidInputError,
    PayloadTooLargeError,
    ServiceError,
    UnsupportedMediaTypeError,
)
from service.gateway.collections.parameters import (
    MAX_SHOWN,
    FolderParameters,
    ListParameters,
    QueryParameters,
)
from service.gateway.dispatch import read_deadline
from service.gateway.entrance import NDJSON
from service.gateway.fetch import Fetch
from service.gateway.rest.body import MAX_FIELDS, collect, load_image, parse_form
from service.gateway.rest.content import read_body, share_of
from service.limits import check_input_count
from service.parameters import validate
from service.payloads import decode_base64, parse_json_lines, parse_json_object
from service.search.collection import (
    MAX_THUMBNAIL,
    Metadata,
    check_id,
    check_metadata,
    check_new_id,
    check_thumbnail,
)

MAX_LINES = 10_000
# Of JSON, so many images are read together.
TOGETHER = 64

JSON, FORM = "application/json", "multipart/form-data"


@dataclass(frozen=True, slots=True)
class Entry:
    """An image to add. One that cannot be added is represented by its error."""

    id: str
    image: bytes | ServiceError
    metadata: Metadata
    thumbnail: bytes | None = None


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for: an encoded image, a text or a vector."""

    by: bytes | str | np.ndarray
    count: int
    where: Metadata
    thumbnails: bool


def read_list(request: Request) -> ListParameters:
    """The query of `GET /collections/{name}/images`.

    Raises:
        InvalidInputError: malformed.
    """
    parameters = validate(ListParameters, collect(request.query_params.multi_items(), frozenset()))
    if parameters.after:
        check_id(parameters.after)
    return parameters


async def read_entries(request: Request) -> list[Entry] | FolderParameters:
    """The images of `POST /collections/{name}/images`, or the folder that has them.

    Raises:
        ServiceError: malformed, over a limit, or too slow.
    """
    content = await read_body(request)
    match _media_type(request):
        case "multipart/form-data":
            entries = await _entries_of_form(request, content)
        case "application/json":
            fields = await parse_json_object(content, share_of(request))
            if "folder" in fields:
                return validate(FolderParameters, fields)
            images = fields.pop("images", None)
            if not isinstance(images, list) or fields:
                raise InvalidInputError(
                    'send {"images": [...]} or {"folder": "..."} alone', field="images"
                )
            check_input_count(request.app.state.settings, len(images))
            entries = await _entries_of_json(request, images, len(content))
        case media_type if media_type == NDJSON:
            if (count := content.count(b"\n")) > MAX_LINES:
                raise PayloadTooLargeError(f"{count} lines; the limit is {MAX_LINES}")
            lines = await parse_json_lines(content, share_of(request))
            entries = await _entries_of_json(request, lines, len(content))
        case _:
            given = collect(request.query_params.multi_items(), frozenset())
            _refuse_others(given, "id", "metadata")
            entries = [_entry(content, given.get("id"), _parsed(given.get("metadata", "{}")))]
    if not entries:
        raise InvalidInputError("the request holds no image", field="image")
    return entries


async def read_query(request: Request) -> Query:
    """The query of `POST /collections/{name}/search`.

    Raises:
        ServiceError: malformed, over a limit, too slow, or not exactly one query.
    """
    content = await read_body(request)
    fields = collect(request.query_params.multi_items(), frozenset())
    images: list[bytes | ServiceError] = []
    match media_type := _media_type(request):
        case "multipart/form-data":
            sent, texts = await _parts(request, content)
            images += sent
            fields |= collect(texts, frozenset())
        case "application/json":
            fields |= await parse_json_object(content, share_of(request))
            listed = fields.pop("images", [])
            if not isinstance(listed, list) or len(listed) > 1:
                raise InvalidInputError("a search takes one image", field="images")
            images += [await load_image(item, _fetch(request)) for item in listed]
        case _ if content:
            images.append(content)
    if isinstance(fields.get("filter"), str):
        fields["filter"] = _parsed(fields["filter"], "filter")
    parameters = validate(QueryParameters, fields)
    if parameters.image is not None:
        images.append(await load_image(parameters.image, _fetch(request)))
    if media_type == JSON:  # what was decoded takes no more than the body did
        share_of(request).give_back_made(2 * len(content))
    queries: list[bytes | str | np.ndarray] = []
    for image in images:
        if isinstance(image, ServiceError):
            raise image
        queries.append(image)
    if parameters.text is not None:
        queries.append(parameters.text)
    if parameters.vector is not None:
        queries.append(np.array(parameters.vector, np.float32))
    if len(queries) != 1:
        raise InvalidInputError("send one image, one text or one vector", field="image")
    where = check_metadata(parameters.filter, "filter")
    if parameters.thumbnails and parameters.k > MAX_SHOWN:
        raise InvalidInputError(f"with thumbnails k is at most {MAX_SHOWN}", field="k")
    return Query(queries[0], parameters.k, where, parameters.thumbnails)


def _media_type(request: Request) -> str:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    others = ("", FORM, JSON, NDJSON, "application/octet-stream")
    if media_type not in others and not media_type.startswith("image/"):
        raise UnsupportedMediaTypeError(
            f"Content-Type {media_type!r}; send {FORM}, {JSON}, {NDJSON} or an image"
        )
    return media_type


async def _entries_of_form(request: Request, content: bytes) -> list[Entry]:
    """Parts `image`, with as many fields `id` and `metadata` or none."""
    images, texts = await _parts(request, content)
    given: dict[str, list[str]] = {"id": [], "metadata": []}
    for name, value in texts:
        if name not in given:
            raise InvalidInputError(f"{name!r}; the fields are id and metadata", field=name)
        given[name].append(value)
    for name, values in given.items():
        if values and len(values) != len(images):
            raise InvalidInputError(f"{len(images)} images and {len(values)} of {name}", field=name)
    ids: Sequence[str | None] = given["id"] or [None] * len(images)
    metadata = given["metadata"] or ["{}"] * len(images)
    entries: list[Entry] = []
    for image, image_id, text in zip(images, ids, metadata, strict=True):
        entries.append(_entry(image, image_id, _parsed(text)))
        await asyncio.sleep(0)  # a field takes up to 5 ms
    return entries


async def _parts(request: Request, content: bytes) -> tuple[list[bytes], list[tuple[str, str]]]:
    limit = request.app.state.settings.max_images
    form = await parse_form(request.headers, content, max_files=limit, max_fields=MAX_FIELDS)
    images: list[bytes] = []
    texts: list[tuple[str, str]] = []
    try:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                texts.append((name, value))
            elif name == "image":
                images.append(await value.read())
            else:
                raise InvalidInputError(f"file part {name!r}; send parts 'image'", field=name)
    finally:
        await form.close()
    return images, texts


def _fetch(request: Request) -> Fetch:
    fetch: Fetch = request.app.state.fetcher.for_request(request, read_deadline(request))
    return fetch


async def _entries_of_json(request: Request, items: Sequence[Any], size: int) -> list[Entry]:
    """Objects of an image with `id`, `metadata` and `thumbnail`, or the error of one that could not
    be read. A wrong one does not fail the others.

    Args:
        size: bytes of the body, which is not kept.
    """
    fetch = _fetch(request)

    async def entry(item: Any) -> Entry:
        if isinstance(item, ServiceError):
            return Entry("", item, {})
        if not isinstance(item, Mapping):
            return Entry("", InvalidInputError("not a JSON object", field="images"), {})
        parts = dict(item)
        name, metadata = parts.pop("id", None), parts.pop("metadata", {})
        thumbnail = parts.pop("thumbnail", None)
        return _entry(await load_image(parts, fetch), name, metadata, thumbnail)

    entries: list[Entry] = []
    for start in range(0, len(items), TOGETHER):  # other requests get their turns between
        entries += await asyncio.gather(*map(entry, items[start : start + TOGETHER]))
    share_of(request).give_back_made(2 * size)  # what was decoded takes no more than the body did
    return entries


def _entry(
    image: bytes | ServiceError, name: object, metadata: object, thumbnail: object = None
) -> Entry:
    """An image to add; without an id it has one made from its content."""
    try:
        if name is None and isinstance(image, bytes):
            name = hashlib.sha256(image).hexdigest()[:32]
        checked = check_metadata(metadata)
        if isinstance(image, ServiceError):
            return Entry(name if isinstance(name, str) else "", image, {})
        return Entry(check_new_id(name), image, checked, _thumbnail(thumbnail))
    except ServiceError as error:
        return Entry("", error.kept(), {})


def _thumbnail(value: object) -> bytes | None:
    """A thumbnail of base64 text; None without any.

    Raises:
        InvalidInputError: it is not one.
    """
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > 2 * MAX_THUMBNAIL:
        raise InvalidInputError(
            f"a thumbnail is base64 text of at most {MAX_THUMBNAIL} bytes", field="thumbnail"
        )
    return check_thumbnail(decode_base64(value, "thumbnail"))


def _parsed(text: str, name: str = "metadata") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"{name} is not valid JSON") from error


def _refuse_others(given: Mapping[str, Any], *known: str) -> None:
    for name in given:
        if name not in known:
            raise InvalidInputError(f"unknown parameter {name!r}", field=name)
