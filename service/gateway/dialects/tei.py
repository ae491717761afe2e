"""Hugging Face's Text Embeddings Inference: `/embed` and `/rerank`.

https://huggingface.github.io/text-embeddings-inference/. Inputs are texts; `data:` URIs of images
among them are images.
"""

from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from service.errors import InvalidInputError
from service.gateway import dispatch
from service.gateway.auth import require_key
from service.gateway.embedding import embed_inputs, embeddings, image_or_text
from service.gateway.entrance import refused_early
from service.gateway.rest.content import read_body
from service.gateway.rest.examples import PHOTO, json_body
from service.parameters import validate
from service.payloads import parse_json_object

router = APIRouter(prefix="/tei", tags=["dialects"], dependencies=[Depends(require_key)])


class EmbedBody(BaseModel):
    """TEI's members. Others, such as `truncate`, are ignored: texts are always truncated."""

    inputs: str | list[str]
    normalize: bool = True
    dimensions: int | None = None
    model: str | None = Field(None, description="Not in TEI, which has one model.")


class RerankBody(BaseModel):
    """TEI's members, of which others are ignored."""

    query: str
    texts: list[str] = Field(min_length=1)
    return_text: bool = False
    model: str | None = Field(None, description="Not in TEI, which has one model.")


_EMBED = json_body(
    {"model": "lite0-minilm", "inputs": ["a cat", f"data:image/jpeg;base64,{PHOTO}"]},
    EmbedBody.model_json_schema(),
)
_RERANK = json_body(
    {"model": "lite0-minilm", "query": "an astronaut", "texts": ["a spaceman", "a cup of coffee"]},
    RerankBody.model_json_schema(),
)


@router.post("/embed", openapi_extra=_EMBED)
@refused_early("embed")
async def embed(request: Request) -> JSONResponse:
    """Embed texts and images: a list of vectors."""
    with dispatch.count_request(request, "embed") as account:
        body = validate(EmbedBody, await parse_json_object(await read_body(request)))
        texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
        if not texts:
            raise InvalidInputError("inputs is empty", field="inputs")
        options: dict[str, Any] = {"normalize": body.normalize, "dimensions": body.dimensions}
        items = [image_or_text(text) for text in texts]
        result = await embed_inputs(request, account, body.model, items, options)
        return JSONResponse([row.tolist() for row in embeddings(result, "inputs")])


@router.post("/rerank", openapi_extra=_RERANK)
@refused_early("embed")
async def rerank(request: Request) -> JSONResponse:
    """Order texts and images by their similarity to the query, best first. The scores are cosine
    similarities of embeddings, with and without `raw_scores`."""
    with dispatch.count_request(request, "embed") as account:
        body = validate(RerankBody, await parse_json_object(await read_body(request)))
        items = [image_or_text(text) for text in (body.query, *body.texts)]
        result = await embed_inputs(request, account, body.model, items, {})
        query, *others = embeddings(result, "texts")
        scores = np.stack(others) @ query
        answer: list[dict[str, Any]] = []
        for place in np.argsort(-scores, kind="stable").tolist():
            entry = {"index": place, "score": float(scores[place])}
            answer.append(entry | ({"text": body.texts[place]} if body.return_text else {}))
        return JSONResponse(answer)
