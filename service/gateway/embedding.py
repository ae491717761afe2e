"""Embeds texts and images for the interfaces that other servers have for it."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import Request
from pydantic import BeforeValidator

from models.tasks.embed import MAX_TEXTS
from service.accounting import Account
from service.errors import PayloadTooLargeError, ServiceError
from service.gateway import dispatch
from service.gateway.fetch import Fetch
from service.gateway.rest.body import load_image
from service.limits import check_input_count
from service.parameters import validated_call
from service.types import ImageResult, InferRequest, InferResult

# A text, or an image as `{"base64": ...}` or `{"url": ...}`.
EmbeddingInput = str | dict[str, str]


def _check_length(value: Any) -> Any:
    if isinstance(value, list):
        check_length(value)
    return value


def check_length(inputs: Sequence[Any]) -> None:
    """
    Raises:
        PayloadTooLargeError: too many inputs.
    """
    if len(inputs) > MAX_TEXTS:
        raise PayloadTooLargeError(f"{len(inputs)} inputs; the limit is {MAX_TEXTS}")


# For the lists of bodies: pydantic has an error of its own for each element that is wrong, so they
# are counted before it looks at them.
COUNTED = BeforeValidator(_check_length)


async def embed_inputs(
    request: Request,
    account: Account,
    model: str | None,
    inputs: Sequence[EmbeddingInput],
    options: dict[str, Any],
) -> InferResult:
    """The backend's result for texts and images.

    Args:
        options: of the task `embed`; those that are None are left out.

    Raises:
        ServiceError: too many inputs, an invalid option, or the request was refused.
    """
    state = request.app.state
    deadline, bulk = dispatch.read_deadline(request), dispatch.read_priority(request)
    account.models = [model or ""]
    check_length(inputs)
    check_input_count(state.settings, sum(not isinstance(item, str) for item in inputs))
    given = {name: value for name, value in options.items() if value is not None}
    call = validated_call(model, "embed", given)
    fetch = state.fetcher.for_request(request, deadline)
    loaded = await asyncio.gather(*(_load(item, fetch) for item in inputs))
    infer_request = InferRequest(inputs=loaded, calls=[call], deadline=deadline, bulk=bulk)
    return await dispatch.infer(request, infer_request, account)


def embeddings(result: InferResult, field: str = "input") -> list[np.ndarray]:
    """The embeddings, for interfaces without failed inputs: the first one fails the request.

    Raises:
        ServiceError: the input's error, with its position.
    """
    return [_vector(position, image, field) for position, image in enumerate(result.images)]


def scores_with_first(result: InferResult, field: str = "input") -> np.ndarray:
    """The cosine similarities of all inputs but the first with the first, (N - 1,).

    Raises:
        ServiceError: as `embeddings`.
    """
    first, *others = embeddings(result, field)
    scores: np.ndarray = np.stack(others) @ first
    return scores


def _vector(position: int, image: ImageResult, field: str) -> np.ndarray:
    output = image.error or image.outputs[0]
    if isinstance(output, ServiceError):
        raise type(output)(
            f"{field} {position}: {output.detail}", field=field, retry_after_s=output.retry_after_s
        )
    return output["embedding"]


def image_or_text(text: str) -> EmbeddingInput:
    """A `data:` URI of an image as an image, any other text as it is."""
    return {"base64": text} if text.startswith("data:image/") else text


def image_input(text: str) -> EmbeddingInput:
    """An image's URL, `data:` URI or base64."""
    return {"url": text} if text.startswith(("http://", "https://")) else {"base64": text}


async def _load(item: EmbeddingInput, fetch: Fetch) -> str | bytes | ServiceError:
    return item if isinstance(item, str) else await load_image(item, fetch)
