"""vLLM's `/pooling`: as OpenAI's embeddings, with the vectors under `data`.

https://docs.vllm.ai/en/latest/models/pooling_models.html
"""

import time
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from models.tasks.embed import encode_embedding
from service.gateway import dispatch
from service.gateway.auth import require_key
from service.gateway.embedding import embed_inputs, embeddings
from service.gateway.entrance import refused_early
from service.gateway.openai.inputs import EmbeddingsRequest, parse_inputs
from service.gateway.rest.content import read_body
from service.gateway.rest.examples import EMBEDDINGS, json_body
from service.logs import request_id
from service.parameters import validate
from service.payloads import parse_json_object

router = APIRouter(tags=["dialects"], dependencies=[Depends(require_key)])


@router.post("/pooling", openapi_extra=json_body(EMBEDDINGS, EmbeddingsRequest.model_json_schema()))
@refused_early("embed")
async def pooling(request: Request) -> JSONResponse:
    """Embed texts and images, in vLLM's form."""
    with dispatch.count_request(request, "embed") as account:
        body = validate(EmbeddingsRequest, await parse_json_object(await read_body(request)))
        options: dict[str, Any] = {"dimensions": body.dimensions}
        inputs = parse_inputs(body)
        result = await embed_inputs(request, account, body.model, inputs, options)
        vectors = embeddings(result)
    data = [
        {
            "index": position,
            "object": "pooling",
            "data": encode_embedding(vector, body.encoding_format),
        }
        for position, vector in enumerate(vectors)
    ]
    return JSONResponse(
        {
            "id": f"pool-{request_id.get()}",
            "object": "list",
            "created": int(time.time()),
            "model": result.models[0].name,
            "data": data,
            "usage": {"prompt_tokens": 0, "total_tokens": 0},
        }
    )
