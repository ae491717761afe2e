"""vLLM's `/pooling`: as OpenAI's embeddings, with the vectors under `data`.

https://docs.vllm.ai/en/latest/models/pooling_models.html
"""

import time
from typing import Any

from fastapi import APIRouter, Depends, Request

from models.tasks.embed import encode_embedding
from service.gateway import dispatch
from service.gateway.auth import require_key
from service.gateway.embedding import embed_inputs, embeddings
from service.gateway.entrance import refused_early
from service.gateway.json_response import JsonResponse, made_of
from service.gateway.openai.inputs import EmbeddingsRequest, parse_inputs
from service.gateway.rest.content import read_json
from service.gateway.rest.examples import EMBEDDINGS, json_body
from service.logs import request_id
from service.parameters import validate
from service.types import InferResult

router = APIRouter(tags=["dialects"], dependencies=[Depends(require_key)])


@router.post("/pooling", openapi_extra=json_body(EMBEDDINGS, EmbeddingsRequest.model_json_schema()))
@refused_early("embed")
async def pooling(request: Request) -> JsonResponse:
    """Embed texts and images, in vLLM's form."""
    with dispatch.count_request(request, "embed") as account:
        body = validate(EmbeddingsRequest, await read_json(request))
        options: dict[str, Any] = {"dimensions": body.dimensions}
        inputs = parse_inputs(body)
        result = await embed_inputs(request, account, body.model, inputs, options)
        return await made_of(request, result, _answer, result, body.encoding_format)


def _answer(result: InferResult, encoding: str) -> JsonResponse:
    data = [
        {"index": position, "object": "pooling", "data": encode_embedding(vector, encoding)}
        for position, vector in enumerate(embeddings(result))
    ]
    return JsonResponse(
        {
            "id": f"pool-{request_id.get()}",
            "object": "list",
            "created": int(time.time()),
            "model": result.models[0].name,
            "data": data,
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
        }
    )
