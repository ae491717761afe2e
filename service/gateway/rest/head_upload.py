"""The body of `POST /heads`: a trained head, or labelled images in one of three ways."""

import asyncio
import base64
import binascii
import io
import json
import zipfile
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile

from service.errors import BadRequestError, InvalidInputError, UnsupportedMediaTypeError
from service.gateway.rest.body import collect, parse_form, read_body
from service.settings import Settings

MAX_PARTS = 10_000


@dataclass(slots=True)
class HeadBody:
    """What a request brought: a head's file, an archive, or images with their labels."""

    fields: dict[str, Any]
    file: bytes | None = None
    archive: bytes | None = None
    labelled: list[tuple[str, bytes]] = field(default_factory=list)


async def read_head_body(request: Request, settings: Settings) -> HeadBody:
    """Read the body in whichever way it came.

    Raises:
        ServiceError: malformed, over a limit, too slow, or several ways at once.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    content = await read_body(request, settings)
    query = collect(request.query_params.multi_items(), frozenset())
    match content_type:
        case "multipart/form-data":
            sent = await _read_form(request, content)
        case "application/json":
            sent = await asyncio.to_thread(_read_json, content)
        case "application/zip":
            sent = HeadBody({}, archive=content)
        case "application/octet-stream" | "":
            sent = HeadBody({}, file=content)
        case _:
            raise UnsupportedMediaTypeError(
                f"Content-Type {content_type!r}; send multipart/form-data, application/json, a "
                "head as application/octet-stream or an archive as application/zip"
            )
    sent.fields = query | sent.fields
    ways = [sent.file is not None, sent.archive is not None, bool(sent.labelled)]
    if sum(ways) != 1:
        raise InvalidInputError(
            "send a head (file), an archive of labelled images, or images with labels", field="file"
        )
    return sent


async def _read_form(request: Request, content: bytes) -> HeadBody:
    form = await parse_form(request, content, max_files=MAX_PARTS, max_fields=2 * MAX_PARTS)
    files: dict[str, list[bytes]] = {"file": [], "archive": [], "image": []}
    labels: list[str] = []
    fields: list[tuple[str, str]] = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
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
        next(iter(files["archive"]), None),
        list(zip(labels, files["image"], strict=True)),
    )


def _read_json(content: bytes) -> HeadBody:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequestError("the body is not valid JSON") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("images", []), list):
        raise BadRequestError("the JSON body must be an object whose images are a list")
    labelled = [_labelled(item) for item in fields.pop("images", [])]
    return HeadBody(fields, labelled=labelled)


def _labelled(item: Any) -> tuple[str, bytes]:
    match item:
        case {"base64": str(text), "label": str(label), **rest} if not rest:
            try:
                return label, base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError) as error:
                raise InvalidInputError("base64 does not decode", field="images") from error
    raise InvalidInputError('an image is {"base64": "...", "label": "..."}', field="images")


def zip_images(labelled: list[tuple[str, bytes]]) -> bytes:
    """Images as an archive of folders; what kind each is, its first bytes tell the decoder."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for number, (label, image) in enumerate(labelled):
            if not label.strip() or label.startswith(".") or {"/", "\\", "\0"} & set(label):
                raise InvalidInputError(f"{label!r} cannot be a label", field="label")
            archive.writestr(f"images/{label}/{number}.jpg", image)
    return content.getvalue()
