"""OpenAI's embeddings interface, extended to images in the four ways that servers have for it.

https://platform.openai.com/docs/api-reference/embeddings
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from models.description import ModelDescription
from models.tasks.embed import MAX_TEXTS, encode_embedding
from service.errors import PayloadTooLargeError, ServiceError
from service.gateway import dispatch
from service.gateway.auth import require_key
from service.gateway.fetch import ImageFetcher
from service.gateway.openai.inputs import EmbeddingInput, EmbeddingsRequest, parse_inputs
from service.gateway.rest.body import load_image, read_body
from service.gateway.rest.examples import EMBEDDINGS, ModelName, json_body
from service.limits import check_input_count
from service.parameters import validate, validated_call
from service.payloads import parse_json_object
from service.settings import Settings
from service.types import ImageResult, InferRequest, InferResult

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
async def embeddings(request: Request) -> JSONResponse:
    """Embed texts and images. `input`: strings, `data:` URIs of images (and URLs with
    `modality: image`), or objects `{"text"}` and `{"image"}`; or `messages` with one text or image.
    """
    state = request.app.state
    with dispatch.count_request(request, "embed") as account:
        deadline, bulk = dispatch.read_deadline(request), dispatch.read_priority(request)
        body = validate(EmbeddingsRequest, await parse_json_object(await read_body(request)))
        account.models = [body.model or ""]
        inputs = parse_inputs(body)
        _check_count(inputs, state.settings)
        options = {} if body.dimensions is None else {"dimensions": body.dimensions}
        infer_request = InferRequest(
            inputs=await asyncio.gather(*(_load(item, state.fetcher) for item in inputs)),
            calls=[validated_call(body.model, "embed", options)],
            deadline=deadline,
            bulk=bulk,
        )
        result = await dispatch.infer(request, infer_request, account)
        return JSONResponse(_answer(result, body.encoding_format))


def _check_count(inputs: Sequence[EmbeddingInput], settings: Settings) -> None:
    if len(inputs) > MAX_TEXTS:
        raise PayloadTooLargeError(f"{len(inputs)} inputs; the limit is {MAX_TEXTS}")
    check_input_count(settings, sum(not isinstance(item, str) for item in inputs))


async def _load(item: EmbeddingInput, fetcher: ImageFetcher) -> str | bytes | ServiceError:
    return item if isinstance(item, str) else await load_image(item, fetcher)


def _answer(result: InferResult, encoding: str) -> dict[str, Any]:
    used = result.models[0]
    data = [
        {
            "object": "embedding",
            "index": position,
            "embedding": encode_embedding(_vector(position, image), encoding),
        }
        for position, image in enumerate(result.images)
    ]
    return {
        "object": "list",
        "data": data,
        "model": used.name,
        "model_digest": used.model_digest,
        "preprocess_digest": used.preprocess_digest,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},  # required by clients
    }


def _vector(position: int, image: ImageResult) -> Any:
    """An input's embedding. The interface has no failed inputs, so the first one fails the request.

    Raises:
        ServiceError: the input's error, with its position.
    """
    output = image.error or image.outputs[0]
    if isinstance(output, ServiceError):
        raise type(output)(
            f"input {position}: {output.detail}", field="input", retry_after_s=output.retry_after_s
        )
    return output["embedding"]


def _model(model: ModelDescription) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "vitrail"}
