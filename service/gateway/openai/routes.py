"""OpenAI's embeddings interface, with the four ways in which servers of its kind take images.

https://platform.openai.com/docs/api-reference/embeddings
"""

import json
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from models.description import ModelDescription
from models.inputs.types import Input
from models.tasks.embed import encode_embedding
from service.accounting import counted
from service.errors import BadRequestError, PayloadTooLargeError, ServiceError
from service.gateway.auth import require_key
from service.gateway.dispatch import ask
from service.gateway.openai.inputs import EmbeddingsRequest, Given, read_inputs
from service.gateway.rest.body import image_of, read_body
from service.parameters import MAX_TEXTS, validate, validated_call
from service.settings import Settings
from service.types import ImageResult, InferResult

router = APIRouter(tags=["OpenAI"], dependencies=[Depends(require_key)])


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Every model, in OpenAI's form."""
    models = await request.app.state.backend.models()
    return {"object": "list", "data": [_model(model) for model in models]}


@router.get("/v1/models/{name}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """One model, in OpenAI's form."""
    return _model(await request.app.state.backend.model(name))


@router.post("/v1/embeddings")
@router.post("/embeddings")
async def embeddings(request: Request) -> JSONResponse:
    """Vectors of texts and images. `input`: strings, `data:` URIs of images (with `modality: image`
    URLs, too), or objects `{"text"}` and `{"image"}`; or `messages` with one text or image."""
    state = request.app.state
    started = request.scope["state"]["started"]
    with counted(state.metrics, state.backend.knows, "embed", started) as seen:
        body = _parse(await read_body(request, state.settings))
        seen.models = [body.model or ""]
        given = read_inputs(body)
        _check_count(given, state.settings)
        inputs: list[Input] = []
        for position, item in enumerate(given):
            loaded = item if isinstance(item, str) else await image_of(item, state.fetcher)
            if isinstance(loaded, ServiceError):
                raise _at(position, loaded)
            inputs.append(loaded)
        options = {} if body.dimensions is None else {"dimensions": body.dimensions}
        call = validated_call(body.model, "embed", options)
        result = await ask(request, inputs, [call])
        seen.answered(result)
        return JSONResponse(_answer(result, body.encoding_format))


def _parse(content: bytes) -> EmbeddingsRequest:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequestError("the body is not valid JSON") from error
    if not isinstance(fields, dict):
        raise BadRequestError("the JSON body must be an object")
    return validate(EmbeddingsRequest, fields)


def _check_count(given: Sequence[Given], settings: Settings) -> None:
    images = sum(not isinstance(item, str) for item in given)
    if images > settings.max_images or len(given) > MAX_TEXTS:
        raise PayloadTooLargeError(
            f"{len(given)} inputs with {images} images in one request; the limits are {MAX_TEXTS} "
            f"and {settings.max_images}"
        )


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
        "usage": {"prompt_tokens": 0, "total_tokens": 0},  # nothing is counted, or billed
    }


def _vector(position: int, image: ImageResult) -> Any:
    """The interface knows no failed items, so the first one fails the request."""
    output = image.error or image.outputs[0]
    if isinstance(output, ServiceError):
        raise _at(position, output)
    return output["embedding"]


def _at(position: int, error: ServiceError) -> ServiceError:
    return type(error)(
        f"input {position}: {error.detail}", field="input", retry_after_s=error.retry_after_s
    )


def _model(model: ModelDescription) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": "vitrail"}
