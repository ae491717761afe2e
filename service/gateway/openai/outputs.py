"""The answer of OpenAI's embeddings interface."""

from typing import Any

from models.tasks.embed import encode_embedding
from service.gateway.embedding import embeddings
from service.types import InferResult


def embeddings_answer(result: InferResult, encoding: str) -> dict[str, Any]:
    """The vectors in OpenAI's form, with the digests of the model that made them.

    Raises:
        ServiceError: an input failed.
    """
    used = result.models[0]
    data = [
        {
            "object": "embedding",
            "index": position,
            "embedding": encode_embedding(vector, encoding),
        }
        for position, vector in enumerate(embeddings(result))
    ]
    return {
        "object": "list",
        "data": data,
        "model": used.name,
        "model_digest": used.model_digest,
        "preprocess_digest": used.preprocess_digest,
        "usage": {"prompt_tokens": 0, "total_tokens": 0},  # required by clients
    }
