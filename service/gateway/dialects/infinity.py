"""Infinity's server: `/embeddings`, `/embeddings_image`, `/rerank`, `/models` and `/health`.

https://github.com/michaelfeil/infinity. Its clients take this server's `/infinity` as their URL.
"""

import time
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from models.description import ModelDescription
from service.gateway import dispatch
from service.gateway.auth import require_key
from service.gateway.embedding import COUNTED, embed_inputs, image_or_text, scores_with_first
from service.gateway.entrance import refused_early
from service.gateway.json_response import JsonResponse, made_of
from service.gateway.openai.inputs import EmbeddingsRequest, parse_inputs
from service.gateway.openai.outputs import embeddings_answer
from service.gateway.rest.content import read_json
from service.gateway.rest.examples import EMBEDDINGS, PHOTO, json_body
from service.logs import request_id
from service.parameters import validate

router = APIRouter(prefix="/infinity", tags=["dialects"])
keyed = [Depends(require_key)]

# What Infinity's clients send where no model was named.
UNSPECIFIED = ("model", "default/not-specified")


class RerankBody(BaseModel):
    """Infinity's members. Others are ignored; `raw_scores` changes nothing."""

    query: str
    documents: Annotated[list[str], COUNTED] = Field(min_length=1)
    model: str | None = None
    return_documents: bool = False
    top_n: int | None = Field(None, ge=1)


_EMBED = json_body(EMBEDDINGS, EmbeddingsRequest.model_json_schema())
_EMBED_IMAGE = json_body(
    {"model": "lite0-minilm", "input": [f"data:image/jpeg;base64,{PHOTO}"]},
    EmbeddingsRequest.model_json_schema(),
)
_RERANK = json_body(
    {
        "model": "lite0-minilm",
        "query": "an astronaut",
        "documents": ["a spaceman", "a cup of coffee"],
    },
    RerankBody.model_json_schema(),
)


@router.get("/health")
async def health() -> dict[str, float]:
    """Infinity's health check: the time. Needs no key."""
    return {"unix": time.time()}


@router.get("/models", dependencies=keyed)
async def list_models(request: Request) -> dict[str, Any]:
    """List the models that embed, in Infinity's form."""
    found = await request.app.state.backend.models()
    return {"object": "list", "data": [_model(model) for model in found if "embed" in model.tasks]}


@router.post("/embeddings", dependencies=keyed, openapi_extra=_EMBED)
@refused_early("embed")
async def embeddings(request: Request) -> JsonResponse:
    """As `/v1/embeddings`: texts, or with `modality: image` URLs and `data:` URIs of images."""
    return await _embed(request, {})


@router.post("/embeddings_image", dependencies=keyed, openapi_extra=_EMBED_IMAGE)
@refused_early("embed")
async def embeddings_image(request: Request) -> JsonResponse:
    """Embed URLs and `data:` URIs of images, as `/embeddings` with `modality: image`."""
    return await _embed(request, {"modality": "image"})


@router.post("/rerank", dependencies=keyed, openapi_extra=_RERANK)
@refused_early("embed")
async def rerank(request: Request) -> JsonResponse:
    """Order documents, texts or `data:` URIs of images, by the cosine similarity of their
    embeddings to the query's, best first."""
    with dispatch.count_request(request, "embed") as account:
        body = validate(RerankBody, await _read(request))
        items = [image_or_text(text) for text in (body.query, *body.documents)]
        result = await embed_inputs(request, account, body.model, items, {})
        scores = scores_with_first(result)
        found: list[dict[str, Any]] = []
        for place in np.argsort(-scores, kind="stable")[: body.top_n].tolist():
            entry = {"index": place, "relevance_score": float(scores[place])}
            document = {"document": body.documents[place]} if body.return_documents else {}
            found.append(entry | document)
        return JsonResponse(
            {
                "object": "rerank",
                "results": found,
                "model": result.models[0].name,
                "usage": {"prompt_tokens": 0, "total_tokens": 0},
            }
            | _identity()
        )


async def _embed(request: Request, members: dict[str, str]) -> JsonResponse:
    """The answer of `/embeddings` to the body with other `members`."""
    with dispatch.count_request(request, "embed") as account:
        body = validate(EmbeddingsRequest, await _read(request) | members)
        options = {"dimensions": body.dimensions or None}
        result = await embed_inputs(request, account, body.model, parse_inputs(body), options)
        return await made_of(
            request,
            result,
            lambda: JsonResponse(embeddings_answer(result, body.encoding_format) | _identity()),
        )


async def _read(request: Request) -> dict[str, Any]:
    """The members of the body, without a `model` that names none.

    Raises:
        ServiceError: malformed, over a limit, or too slow.
    """
    members = await read_json(request)
    return {name: value for name, value in members.items() if (name, value) != UNSPECIFIED}


def _identity() -> dict[str, Any]:
    return {"id": f"infinity-{request_id.get()}", "created": int(time.time())}


def _model(model: ModelDescription) -> dict[str, Any]:
    modalities = model.modalities or ()
    embeds = {"text": "embed", "image": "image_embed"}
    capabilities = [name for modality, name in embeds.items() if modality in modalities]
    return {
        "id": model.name,
        "object": "model",
        "owned_by": "infinity",  # Infinity's clients refuse others
        "created": 0,
        "backend": model.engine or "",
        "capabilities": [*capabilities, *(["rerank"] if capabilities else [])],
        "stats": {},
    }
