"""The machine-learning service of Immich, for its smart search: `/ping` and `/predict`.

https://github.com/immich-app/immich. Immich's server sends a form: `entries` names the task and the
model, and `image` or `text` is what to embed. It drops the path of the URL that it is given, so it
asks `/ping` and `/predict` at the root, whatever that is; `/predict` tells its forms from others.
"""

import asyncio
import io
import json
import re
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from PIL import Image
from starlette.datastructures import UploadFile

from models.tasks.embed import encode_embedding
from service.accounting import Account
from service.errors import BadRequestError, InvalidInputError, UnsupportedMediaTypeError
from service.gateway import dispatch
from service.gateway.auth import require_key
from service.gateway.embedding import embeddings
from service.gateway.entrance import refused_early
from service.gateway.rest.body import parse_form
from service.gateway.rest.content import read_body
from service.parameters import validated_call
from service.types import InferRequest

router = APIRouter(tags=["dialects"])
keyed = [Depends(require_key)]

# How a form begins whose first part is `entries`.
_BEGINNING = re.compile(rb'--[^\r\n]{1,200}\r\nContent-Disposition: form-data; name="entries"\r\n')

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "entries": {"type": "string"},
                        "image": {"type": "string", "format": "binary"},
                        "text": {"type": "string"},
                    },
                    "required": ["entries"],
                },
                "example": {
                    "entries": '{"clip": {"textual": {"modelName": "lite0-minilm"}}}',
                    "text": "a cat",
                },
            }
        },
    }
}


@router.get("/ping", response_class=PlainTextResponse, include_in_schema=False)
@router.get("/immich/ping", response_class=PlainTextResponse)
async def ping() -> str:
    """Immich's health check. Needs no key."""
    return "pong"


@router.post("/immich/predict", dependencies=keyed, openapi_extra=_FORM)
@refused_early("embed")
async def predict(request: Request) -> JSONResponse:
    """Embed an image or a text for Immich's search. Faces and text in images are not recognized."""
    with dispatch.count_request(request, "embed") as account:
        return await answer(request, await read_body(request), account)


def is_form(body: bytes) -> bool:
    """Whether a body is a form that Immich's server sends."""
    return _BEGINNING.match(body) is not None


async def answer(request: Request, body: bytes, account: Account) -> JSONResponse:
    """The answer to a form of Immich's server.

    Raises:
        ServiceError: malformed, for a task that is not served, or the model failed.
    """
    deadline = dispatch.read_deadline(request)
    model, content = await _read(request, body)
    infer_request = InferRequest(
        inputs=[content], calls=[validated_call(model, "embed", {})], deadline=deadline
    )
    result = await dispatch.infer(request, infer_request, account)
    result.raise_if_all_failed()
    [vector] = embeddings(result, "image")
    members: dict[str, Any] = {"clip": json.dumps(encode_embedding(vector, "float"))}
    if isinstance(content, bytes):
        width, height = await asyncio.to_thread(_size, content)
        members |= {"imageWidth": width, "imageHeight": height}
    return JSONResponse(members)


async def _read(request: Request, body: bytes) -> tuple[str, str | bytes]:
    """The model's name, and the text or the encoded image."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise UnsupportedMediaTypeError("send multipart/form-data with entries")
    form = await parse_form(request.headers, body, max_files=1, max_fields=4)
    try:
        image, text, entries = form.get("image"), form.get("text"), form.get("entries")
        content = await image.read() if isinstance(image, UploadFile) else text
    finally:
        await form.close()
    try:
        tasks = json.loads(str(entries))
    except (ValueError, RecursionError) as error:
        raise BadRequestError("entries is not valid JSON") from error
    match tasks, content:
        case {"clip": {"visual": {"modelName": str(model)}}, **rest}, bytes() if not rest:
            return model, content
        case {"clip": {"textual": {"modelName": str(model)}}, **rest}, str() if not rest:
            return model, content
    raise InvalidInputError(
        "entries holds clip with visual for an image, or with textual for a text; other tasks are "
        "not served",
        field="entries",
    )


def _size(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as image:  # reads the header alone
        return image.size
