"""Cohere's `/v2/embed`. https://docs.cohere.com/v2/reference/embed"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

from models.tasks.embed import encode_embedding, quantize
from service.errors import InvalidInputError
from service.gateway import dispatch
from service.gateway.auth import require_key
from service.gateway.embedding import (
    COUNTED,
    EmbeddingInput,
    embed_inputs,
    embeddings,
    image_input,
)
from service.gateway.entrance import refused_early
from service.gateway.json_response import JsonResponse, made_of
from service.gateway.rest.content import read_json
from service.gateway.rest.examples import PHOTO, json_body
from service.logs import request_id
from service.parameters import validate
from service.types import InferResult

router = APIRouter(prefix="/cohere", tags=["dialects"], dependencies=[Depends(require_key)])

Encoding = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]


class CohereBody(BaseModel):
    """Cohere's members. Others are ignored; `input_type` changes nothing here."""

    model: str | None = None
    input_type: str | None = None
    texts: Annotated[list[str], COUNTED] | None = None
    images: Annotated[list[str], COUNTED] | None = None
    inputs: Annotated[list[dict[str, Any]], COUNTED] | None = None
    embedding_types: Annotated[list[Encoding], COUNTED] = Field(["float"], min_length=1)
    output_dimension: int | None = None


_EMBED = json_body(
    {
        "model": "lite0-minilm",
        "input_type": "image",
        "images": [f"data:image/jpeg;base64,{PHOTO}"],
        "embedding_types": ["float", "int8"],
    },
    CohereBody.model_json_schema(),
)


@router.post("/v2/embed", openapi_extra=_EMBED)
@refused_early("embed")
async def embed(request: Request) -> JsonResponse:
    """Embed `texts`, `images` or `inputs` of one text or image each, in one or several types."""
    with dispatch.count_request(request, "embed") as account:
        body = validate(CohereBody, await read_json(request))
        items = parse_items(body)
        options = {"dimensions": body.output_dimension}
        result = await embed_inputs(request, account, body.model, items, options)
        return await made_of(request, result, _answer, result, items, body.embedding_types)


def _answer(
    result: InferResult, items: Sequence[EmbeddingInput], encodings: Sequence[Encoding]
) -> JsonResponse:
    vectors = embeddings(result)
    texts = [item for item in items if isinstance(item, str)]
    return JsonResponse(
        {
            "id": request_id.get(),
            "response_type": "embeddings_by_type",
            "embeddings": {
                encoding: [_encoded(vector, encoding) for vector in vectors]
                for encoding in dict.fromkeys(encodings)
            },
            "texts": texts,
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": 0, "images": len(items) - len(texts)},
            },
        }
    )


def parse_items(body: CohereBody) -> list[EmbeddingInput]:
    """The inputs, in order.

    Raises:
        InvalidInputError: not exactly one of `texts`, `images` and `inputs`, or one that is empty.
    """
    given = [name for name in ("texts", "images", "inputs") if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidInputError("send one of texts, images and inputs", field="inputs")
    items: list[EmbeddingInput]
    if body.texts is not None:
        items = list(body.texts)
    elif body.images is not None:
        items = [image_input(image) for image in body.images]
    else:
        items = [_of_content(item) for item in body.inputs or []]
    if not items:
        raise InvalidInputError(f"{given[0]} is empty", field=given[0])
    return items


def _of_content(item: dict[str, Any]) -> EmbeddingInput:
    match item.get("content"):
        case [{"type": "text", "text": str(text)}]:
            return text
        case [{"type": "image_url", "image_url": {"url": str(url)}}]:
            return image_input(url)
    raise InvalidInputError(
        "an input's content is one text or one image_url; mixtures are not embedded together",
        field="inputs",
    )


def _encoded(vector: np.ndarray, encoding: Encoding) -> Any:
    """A unit vector as Cohere has it: int8 and binary are signed, uint8 and ubinary the same
    numbers plus 128."""
    match encoding:
        case "uint8":
            return (quantize(vector, "int8").astype(int) + 128).tolist()
        case "binary":
            return (quantize(vector, "binary").astype(int) - 128).tolist()
        case "ubinary":
            return quantize(vector, "binary").tolist()
    return encode_embedding(vector, encoding)
