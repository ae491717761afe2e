"""OpenAI's embeddings interface, extended to images in the four ways that servers have for it.

https://platform.openai.com/docs/api-reference/embeddings
"""

from typing import Any

from fastapi import APIRouter, Depends, Request

from models.description import ModelDescription
from service.gateway import dispatch
from service.gateway.auth import require_key
from service.gateway.embedding import embed_inputs
from service.gateway.entrance import refused_early
from service.gateway.json_response import JsonResponse, made_of
from service.gateway.openai.inputs import EmbeddingsRequest, parse_inputs
from service.gateway.openai.outputs import embeddings_answer
from service.gateway.rest.content import read_json
from service.gateway.rest.examples import EMBEDDINGS, ModelName, json_body
from service.parameters import validate

router = APIRouter(tags=["OpenAI"], dependencies=[Depends(require_key)])

_BODY = json_body(EMBEDDINGS, EmbeddingsRequest.model_json_schema())


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """List every model, in OpenAI's form."""
    models = await request.app.state.backend.models()
    return {"object": "list", "data": [_model(model) for model in models]}


@router.get("/v1/models/{name}")
async def get_model(request: Request, name: ModelName) -> dict[str, Any]:
    """Describe a model, in OpenAI's form."""
    return _model(await request.app.state.backend.model(name))


@router.post("/v1/embeddings", openapi_extra=_BODY)
@router.post("/embeddings", openapi_extra=_BODY)
@refused_early("embed")
async def embeddings(request: Request) -> JsonResponse:
    """Embed texts and images. `input`: strings, `data:` URIs of images (and URLs with
    `modality: image`), or objects `{"text"}` and `{"image"}`; or `messages` with one text or image.
    """
    with dispatch.count_request(request, "embed") as account:
        body = validate(EmbeddingsRequest, await read_json(request))
        options = {"dimensions": body.dimensions or None, "truncate": body.truncate is True}
        inputs = parse_inputs(body)
        result = await embed_inputs(request, account, body.model, inputs, options)
        return await made_of(
            request, result, lambda: JsonResponse(embeddings_answer(result, body.encoding_format))
        )


def _model(model: ModelDescription) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "vitrail"}
