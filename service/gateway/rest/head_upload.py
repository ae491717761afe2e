"""The body of `POST /heads`: a trained head, an adapter, an archive, or images with labels."""

import asyncio
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, UploadFile

from service.errors import BadRequestError, InvalidInputError, UnsupportedMediaTypeError
from service.gateway.rest.body import collect, parse_form
from service.gateway.rest.content import read_body, share_of
from service.limits import Share
from service.payloads import decode_base64, parse_json_object

MAX_PARTS = 10_000
# The kind of an upload that is peft's files.
LORA = "lora"
# The files of an adapter, as peft names them.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(slots=True)
class HeadBody:
    """The fields of a request, with a head's file, an adapter's two files, an archive or labelled
    images."""

    fields: dict[str, Any]
    file: bytes | None = None
    adapter: dict[str, bytes] = field(default_factory=dict)
    archive: bytes | None = None
    labelled: list[tuple[str, bytes]] = field(default_factory=list)


async def read_head_body(request: Request) -> HeadBody:
    """Read and parse the body.

    Raises:
        ServiceError: malformed, over a limit, too slow, or with more than one of the three.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    content = await read_body(request)
    query = collect(request.query_params.multi_items(), frozenset())
    match content_type:
        case "multipart/form-data":
            body = await _parse_multipart(request.headers, content)
        case "application/json":
            body = await _parse_json(content, share_of(request))
        case "application/zip":
            body = HeadBody({}, archive=content)
        case "application/octet-stream" | "":
            body = HeadBody({}, file=content)
        case _:
            raise UnsupportedMediaTypeError(
                f"Content-Type {content_type!r}; send multipart/form-data, application/json, a "
                "head as application/octet-stream or an archive as application/zip"
            )
    body.fields = query | body.fields
    contents = (body.file is not None, bool(body.adapter), body.archive is not None,
                bool(body.labelled))  # fmt: skip
    if sum(contents) != 1:
        raise InvalidInputError(
            "send a head (file), an adapter's two files, an archive of labelled images, or images "
            "with labels",
            field="file",
        )
    if body.fields.get("kind") == LORA:
        return _as_adapter(body)
    if body.adapter:
        raise InvalidInputError(f"an adapter's files need kind={LORA}", field="kind")
    return body


def _as_adapter(body: HeadBody) -> HeadBody:
    """The body of an adapter with one file: a zip archive of peft's two files."""
    if body.adapter and (missing := [name for name in ADAPTER_FILES if name not in body.adapter]):
        raise InvalidInputError(f"{missing[0]} is missing", field="file")
    content = zip_files(body.adapter) if body.adapter else body.file or body.archive
    if content is None:
        raise InvalidInputError(
            f"an adapter is a zip archive, or the parts {' and '.join(ADAPTER_FILES)}", field="file"
        )
    return HeadBody(body.fields, file=content)


async def _parse_multipart(headers: Headers, content: bytes) -> HeadBody:
    form = await parse_form(headers, content, max_files=MAX_PARTS, max_fields=2 * MAX_PARTS)
    files: dict[str, list[bytes]] = {"file": [], "archive": [], "image": []}
    adapter: dict[str, bytes] = {}
    labels: list[str] = []
    fields: list[tuple[str, str]] = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if (own := _adapter_file(name, value.filename)) is not None:
                    if own in adapter:
                        raise InvalidInputError(f"two files {own}", field=name)
                    adapter[own] = await value.read()
                    continue
                if name not in files:
                    parts = ", ".join(files)
                    raise InvalidInputError(f"file part {name!r}; there are {parts}", field=name)
                files[name].append(await value.read())
            elif name == "label":
                labels.append(value)
            else:
                fields.append((name, value))
    finally:
        await form.close()
    if len(labels) != len(files["image"]):
        raise InvalidInputError(
            f"{len(files['image'])} images and {len(labels)} labels; each image needs one",
            field="label",
        )
    if len(files["file"]) > 1 or len(files["archive"]) > 1:
        raise InvalidInputError("a request holds one file or one archive", field="file")
    return HeadBody(
        collect(fields, frozenset()),
        next(iter(files["file"]), None),
        adapter,
        next(iter(files["archive"]), None),
        list(zip(labels, files["image"], strict=True)),
    )


def _adapter_file(part: str, filename: str | None) -> str | None:
    """Which of an adapter's files a part is, by its own name or its file's; None for another."""
    base = (filename or "").replace("\\", "/").rpartition("/")[2]
    for name in ADAPTER_FILES:
        if part in (name, name.rpartition(".")[0]) or base == name:
            return name
    return None


def zip_files(files: Mapping[str, bytes]) -> bytes:
    """Files by name as an archive, not compressed."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, file in files.items():
            archive.writestr(name, file)
    return content.getvalue()


async def _parse_json(content: bytes, share: Share) -> HeadBody:
    fields = await parse_json_object(content, share)
    items = fields.pop("images", [])
    if not isinstance(items, list):
        raise BadRequestError("the JSON body must be an object whose images are a list")
    labelled = await asyncio.to_thread(lambda: [_labelled(item) for item in items])
    share.give_back_made(len(content))  # of the base64, which is not kept
    return HeadBody(fields, labelled=labelled)


def _labelled(item: Any) -> tuple[str, bytes]:
    match item:
        case {"base64": str(text), "label": str(label), **rest} if not rest:
            return label, decode_base64(text, "images")
    raise InvalidInputError('an image is {"base64": "...", "label": "..."}', field="images")


def zip_images(labelled: list[tuple[str, bytes]]) -> bytes:
    """Labelled images as an archive with one folder for each label.

    Every file is named `.jpg`, whatever its format: the decoder reads formats from the content.

    Raises:
        InvalidInputError: a label cannot be the name of a folder.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for number, (label, image) in enumerate(labelled):
            if not label.strip() or label.startswith(".") or {"/", "\\", "\0"} & set(label):
                raise InvalidInputError(f"{label!r} cannot be a label", field="label")
            archive.writestr(f"images/{label}/{number}.jpg", image)
    return content.getvalue()
