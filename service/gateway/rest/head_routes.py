"""Heads as a resource: uploaded as files or fitted to images, and then served as models."""

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from service.backend import Heads
from service.errors import InvalidInputError
from service.gateway.auth import require_head_key, require_key
from service.gateway.rest.examples import HeadName, HeadPart
from service.gateway.rest.head_upload import LORA, read_head_body, zip_images
from service.gateway.rest.openapi import head_body
from service.parameters import FitParameters, HeadParameters, validate
from service.types import FitRequest, HeadUpload

router = APIRouter(tags=["heads"])

MEDIA_TYPES = {"json": "application/json", "png": "image/png"}


@router.get("/heads", dependencies=[Depends(require_key)])
async def list_heads(request: Request) -> dict[str, list[dict[str, Any]]]:
    """List the heads that were uploaded or fitted, or are being fitted."""
    return {"heads": [head.to_json() for head in await _heads(request).all()]}


@router.get("/heads/{name}", dependencies=[Depends(require_key)])
async def get_head(request: Request, name: HeadName) -> dict[str, Any]:
    """Describe a head, as a model. A head that is being fitted has a member `progress`."""
    return (await _heads(request).get(name)).to_json()


@router.get("/heads/{name}/{part}", dependencies=[Depends(require_key)])
async def read_head(request: Request, name: HeadName, part: HeadPart) -> Response:
    """Download `head.safetensors`; for a head that was fitted here also `report.json`,
    `curve.png` and `confusion.png`."""
    async with request.app.state.reading_heads:
        content = await _heads(request).read(name, part)
    media_type = MEDIA_TYPES.get(part.rpartition(".")[2], "application/octet-stream")
    return Response(content, media_type=media_type)


@router.delete("/heads/{name}", status_code=204, dependencies=[Depends(require_head_key)])
async def delete_head(request: Request, name: HeadName) -> None:
    """Delete a head, or stop fitting it."""
    await _heads(request).delete(name)


@router.post(
    "/heads",
    status_code=201,
    dependencies=[Depends(require_head_key)],
    openapi_extra=head_body(),
)
async def post_head(request: Request, response: Response) -> dict[str, Any]:
    """Upload a trained head (part `file`, or the body itself) under `name`; or with `kind=lora` an
    adapter for `trunk`, as peft's `adapter_config.json` and `adapter_model.safetensors` (two parts,
    or a zip archive of both); or fit a head on `trunk`:
    to a zip archive of folders (part `archive`), to parts `image` with a field `label` each, or to
    JSON's `images`, `{"base64", "label"}` each. Fitting returns 202 and goes on in the background.
    """
    body = await read_head_body(request)
    common = HeadParameters.model_fields.keys()
    parameters = validate(HeadParameters, {k: v for k, v in body.fields.items() if k in common})
    rest = {k: v for k, v in body.fields.items() if k not in common}
    if body.file is not None:
        kind = rest.pop("kind") if rest.get("kind") == LORA else ""
        if rest:
            raise InvalidInputError(f"a trained head takes no {', '.join(rest)}", field=min(rest))
        upload = HeadUpload(
            name=parameters.name,
            content=body.file,
            kind=kind,
            trunk=parameters.trunk,
            replace=parameters.replace,
        )
        return (await _heads(request).put(upload)).to_json()
    options = validate(FitParameters, rest)
    if parameters.trunk is None:
        raise InvalidInputError("trunk is missing: the trunk to fit the head on", field="trunk")
    archive = body.archive
    if archive is None:
        archive = await asyncio.to_thread(zip_images, body.labelled)
    fit = FitRequest(
        name=parameters.name,
        trunk=parameters.trunk,
        archive=archive,
        options=options.model_dump(exclude_none=True),
        replace=parameters.replace,
    )
    head = await _heads(request).fit(fit)
    response.status_code = 202
    return head.to_json()


def _heads(request: Request) -> Heads:
    heads: Heads = request.app.state.backend.heads
    return heads
