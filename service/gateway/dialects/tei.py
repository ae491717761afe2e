"""Hugging Face's Text Embeddings Inference: `/embed`, `/similarity` and `/rerank`.

https://huggingface.github.io/text-embeddings-inference/. Inputs are texts; `data:` URIs of images
among them are images. TEI has one model; here `?model=` names one, or a member of the body.
"""

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field, WithJsonSchema

from service.accounting import Account
from service.errors import InvalidInputError
from service.gateway import dispatch
from service.gateway.auth import require_key
from service.gateway.embedding import (
    COUNTED,
    embed_inputs,
    embeddings,
    image_or_text,
    scores_with_first,
)
from service.gateway.entrance import refused_early
from service.gateway.json_response import JsonResponse, made_of
from service.gateway.rest.content import read_json
from service.gateway.rest.examples import PHOTO, json_body
from service.gateway.rest.openapi import query_parameters
from service.parameters import validate
from service.types import InferResult

B = TypeVar("B", bound=BaseModel)

router = APIRouter(prefix="/tei", tags=["dialects"], dependencies=[Depends(require_key)])


MODEL: Any = Field(None, description="Not in TEI, which has one model.")


class EmbedBody(BaseModel):
    """TEI's members. Others, such as `truncate`, are ignored: texts are always truncated."""

    inputs: str | Annotated[list[str], COUNTED]
    normalize: bool = True
    dimensions: int | None = None
    model: str | None = MODEL


class Sentences(BaseModel):
    """What to compare with what."""

    source_sentence: str
    sentences: Annotated[list[str], COUNTED] = Field(min_length=1)


class SimilarityBody(BaseModel):
    """TEI's members, of which others are ignored."""

    # inline: OpenAPI's document has no place for pydantic's definitions
    inputs: Annotated[Sentences, WithJsonSchema(Sentences.model_json_schema())]
    model: str | None = MODEL


class RerankBody(BaseModel):
    """TEI's members, of which others are ignored."""

    query: str
    texts: Annotated[list[str], COUNTED] = Field(min_length=1)
    return_text: bool = False
    model: str | None = MODEL


def _body(example: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    model = {
        "model": {"type": "string", "description": "A model; else the body's, or the default."}
    }
    return json_body(example, schema) | {"parameters": query_parameters(model)}


_EMBED = _body(
    {"model": "lite0-minilm", "inputs": ["a cat", f"data:image/jpeg;base64,{PHOTO}"]},
    EmbedBody.model_json_schema(),
)
_SIMILARITY = _body(
    {
        "model": "lite0-minilm",
        "inputs": {"source_sentence": "an astronaut", "sentences": ["a spaceman", "a cup"]},
    },
    SimilarityBody.model_json_schema(),
)
_RERANK = _body(
    {"model": "lite0-minilm", "query": "an astronaut", "texts": ["a spaceman", "a cup of coffee"]},
    RerankBody.model_json_schema(),
)


@router.post("/embed", openapi_extra=_EMBED)
@refused_early("embed")
async def embed(request: Request) -> JsonResponse:
    """Embed texts and images: a list of vectors."""
    with dispatch.count_request(request, "embed") as account:
        body = await _read(request, EmbedBody)
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        if not texts:
            raise InvalidInputError("inputs is empty", field="inputs")
        options = {"normalize": body.normalize, "dimensions": body.dimensions}
        result = await _embed(request, account, body.model, texts, options)
        return await made_of(
            request,
            result,
            lambda: JsonResponse([row.tolist() for row in embeddings(result, "inputs")]),
        )


@router.post("/similarity", openapi_extra=_SIMILARITY)
@refused_early("embed")
async def similarity(request: Request) -> JsonResponse:
    """Compare texts and images with a source sentence: a list of cosine similarities."""
    with dispatch.count_request(request, "embed") as account:
        body = await _read(request, SimilarityBody)
        texts = [body.inputs.source_sentence, *body.inputs.sentences]
        result = await _embed(request, account, body.model, texts, {})
        return JsonResponse(scores_with_first(result, "inputs").tolist())


@router.post("/rerank", openapi_extra=_RERANK)
@refused_early("embed")
async def rerank(request: Request) -> JsonResponse:
    """Order texts and images by their similarity to the query, best first. The scores are cosine
    similarities of embeddings, with and without `raw_scores`."""
    with dispatch.count_request(request, "embed") as account:
        body = await _read(request, RerankBody)
        texts = [body.query, *body.texts]
        result = await _embed(request, account, body.model, texts, {})
        scores = scores_with_first(result, "inputs")
        answer: list[dict[str, Any]] = []
        for place in np.argsort(-scores, kind="stable").tolist():
            entry = {"index": place, "score": float(scores[place])}
            answer.append(entry | ({"text": body.texts[place]} if body.return_text else {}))
        return JsonResponse(answer)


async def _read(request: Request, kind: type[B]) -> B:
    """The body; its model may be in the query, since TEI's clients cannot send one.

    Raises:
        ServiceError: malformed, over a limit, or too slow.
    """
    fields = await read_json(request)
    return validate(kind, {"model": request.query_params.get("model"), **fields})


async def _embed(
    request: Request,
    account: Account,
    model: str | None,
    texts: Sequence[str],
    options: dict[str, Any],
) -> InferResult:
    """The result for texts and images.

    Raises:
        ServiceError: as `embed_inputs`.
    """
    items = [image_or_text(text) for text in texts]
    return await embed_inputs(request, account, model, items, options)
