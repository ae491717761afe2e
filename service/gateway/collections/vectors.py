"""Vectors of images and queries, made by the very version of the model that a collection has."""

import asyncio
import time
from collections.abc import Sequence

import numpy as np
from fastapi import Request

from models.inputs.types import Input
from service.errors import ConflictError, InvalidInputError, QueueFullError, ServiceError
from service.gateway import dispatch
from service.gateway.auth import count_images
from service.gateway.disconnect import cancelled_by_disconnect
from service.parameters import validated_call
from service.search.collection import Collection
from service.types import ImageResult, InferRequest, InferResult


async def embed(
    request: Request,
    model: str | None,
    inputs: Sequence[Input | ServiceError],
    deadline: float,
    *,
    bulk: bool = False,
) -> InferResult:
    """Embed inputs, a chunk at a time; bulk ones wait while the queue is full.

    Raises:
        ServiceError: the request as a whole was refused.
        ClientDisconnect: the client disconnected.
    """
    state = request.app.state
    size = state.settings.max_images
    images: list[ImageResult] = []
    with (
        dispatch.count_request(request, "embed") as account,
        cancelled_by_disconnect(request.scope),
    ):
        count_images(request, len(inputs))  # once: a chunk may be sent several times
        for start in range(0, len(inputs), size):
            chunk = InferRequest(
                inputs=inputs[start : start + size],
                calls=[validated_call(model, "embed", {})],
                deadline=deadline,
                bulk=bulk,
            )
            account.requested(chunk)
            while True:
                try:
                    result = await dispatch.send(state.backend, chunk, size)
                    break
                except QueueFullError as error:
                    wait_s = min(error.retry_after_s or 1, 1.0)
                    if not bulk or time.monotonic() + wait_s >= deadline:
                        raise
                    await asyncio.sleep(wait_s)
            images += result.images
        result = InferResult(result.models, images)
        account.answered(result)
    return result


def vector_of(image: ImageResult) -> np.ndarray:
    """An input's embedding.

    Raises:
        ServiceError: the input's error.
    """
    output = image.error or image.outputs[0]
    if isinstance(output, ServiceError):
        raise output
    return output["embedding"]


def unit_vector(vector: np.ndarray, collection: Collection) -> np.ndarray:
    if vector.shape != (collection.dimensions,):
        raise InvalidInputError(
            f"the vector has {vector.size} numbers; the collection's have {collection.dimensions}",
            field="vector",
        )
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if not 0 < length < float("inf"):
        raise InvalidInputError("the vector has no direction", field="vector")
    return (vector / length).astype(np.float32)


def check_digests(collection: Collection, result: InferResult) -> None:
    """Check that an answer came from the version of the model that embedded the collection.

    Raises:
        ConflictError: it is another one.
    """
    _compare(collection, result.models[0].model_digest)


async def check_current(request: Request, collection: Collection) -> None:
    """As `check_digests`, for queries that need no answer of the model."""
    model = await request.app.state.backend.model(collection.model)
    if model.model_digest is not None:
        _compare(collection, model.model_digest)


def _compare(collection: Collection, model_digest: str) -> None:
    # The model's digest covers its transform. An answer's preprocess_digest is that of its inputs,
    # so texts and images have different ones.
    if model_digest != collection.model_digest:
        raise ConflictError(
            f"another version of the model {collection.model} embedded the collection "
            f"{collection.name!r} ({collection.model_digest[:19]}...); create it again"
        )
