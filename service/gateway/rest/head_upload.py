"""The body of `POST /heads`: a trained head, an archive, or images with labels."""

import asyncio
import io
import zipfile
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, UploadFile

from service.errors import BadRequestError, InvalidInputError, UnsupportedMediaTypeError
from service.gateway.rest.body import collect, parse_form, read_body
from service.payloads import decode_base64, parse_json_object

MAX_PARTS = 10_000


@dataclass(slots=True)
class HeadBody:
    """The fields of a request, with a head's file, an archive or labelled images."""

    fields: dict[str, Any]
    file: bytes | None = None
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
            body = await _parse_json(content)
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
    contents = [body.file is not None, body.archive is not None, bool(body.labelled)]
    if sum(contents) != 1:
        raise InvalidInputError(
            "send a head (file), an archive of labelled images, or images with labels", field="file"
        )
    return body


async def _parse_multipart(headers: Headers, content: bytes) -> HeadBody:
    form = await parse_form(headers, content, max_files=MAX_PARTS, max_fields=2 * MAX_PARTS)
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


async def _parse_json(content: bytes) -> HeadBody:
    fields = await parse_json_object(content)
    items = fields.pop("images", [])
    if not isinstance(items, list):
        raise BadRequestError("the JSON body must be an object whose images are a list")
    labelled = await asyncio.to_thread(lambda: [_labelled(item) for item in items])
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
