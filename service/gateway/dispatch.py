"""Sends a request to the backend: deadline, priority, metrics, and the client's disconnect."""

import time
from contextlib import AbstractContextManager
from dataclasses import replace

from starlette.requests import Request

from service.accounting import Account, counted
from service.backend import Backend
from service.errors import InvalidInputError, ServiceError
from service.gateway.auth import count_images
from service.gateway.disconnect import cancelled_by_disconnect
from service.gateway.lateness import Lateness
from service.limits import MAX_TIMEOUT_MS
from service.settings import Settings
from service.types import ImageResult, InferRequest, InferResult
from service.versions import of_one_version


def count_request(request: Request, task: str) -> AbstractContextManager[Account]:
    """A context in which the request is counted in the metrics, under that task."""
    state = request.app.state
    return counted(state.metrics, state.backend.knows, task, request.scope["state"]["started"])


async def infer(request: Request, infer_request: InferRequest, account: Account) -> InferResult:
    """The backend's result; cancelled as soon as the client disconnects.

    Raises:
        ServiceError: the request as a whole was refused.
        ClientDisconnect: the client disconnected.
    """
    account.requested(infer_request)
    count_images(request, len(infer_request.inputs))
    settings: Settings = request.app.state.settings
    with cancelled_by_disconnect(request.scope):
        result = await send(request.app.state.backend, infer_request, settings.max_images)
    state = request.scope["state"]
    if time.monotonic() <= state.get("deadline", 0.0):  # else its own time was too short
        state["due"] = state["deadline"]
    account.answered(result)
    return result


async def send(backend: Backend, infer_request: InferRequest, chunk_size: int) -> InferResult:
    """The backend's result for the inputs that could be read, with the errors of the others.

    Inputs are sent in chunks, one after the other: many texts at once would fill the queue.

    Raises:
        ServiceError: the request as a whole was refused.
    """
    inputs = infer_request.readable
    # Without inputs, the backend still resolves the calls and checks their options.
    chunks = [
        replace(infer_request, inputs=inputs[start : start + chunk_size])
        for start in range(0, max(1, len(inputs)), chunk_size)
    ]

    async def send_all() -> list[InferResult]:
        return [await backend.infer(chunk) for chunk in chunks]

    results = await of_one_version(send_all)
    images = iter([image for result in results for image in result.images])
    merged = [
        ImageResult(error=item) if isinstance(item, ServiceError) else next(images)
        for item in infer_request.inputs
    ]
    return InferResult(results[0].models, merged)


def read_deadline(request: Request) -> float:
    """The deadline in `time.monotonic` seconds, by `X-Timeout-Ms` or the default timeout.

    Raises:
        InvalidInputError: the header is not a positive number.
    """
    header = request.headers.get("x-timeout-ms")
    if header is None:
        return deadline_after(request, request.app.state.settings.default_timeout_ms)
    try:
        return deadline_after(request, float(header))
    except (ValueError, InvalidInputError) as error:
        raise InvalidInputError(
            f"X-Timeout-Ms is {header!r}; it must be a positive number"
        ) from error


def deadline_after(request: Request, timeout_ms: float) -> float:
    """The deadline in `time.monotonic` seconds: that long after the request's arrival, less the
    reserve that is kept while answers come late.

    Raises:
        InvalidInputError: not a positive number.
    """
    if not 0 < timeout_ms < float("inf"):
        raise InvalidInputError(f"timeout is {timeout_ms} ms; it must be a positive number")
    timeout_s = min(timeout_ms, MAX_TIMEOUT_MS) / 1e3
    state = request.scope["state"]
    lateness: Lateness = request.app.state.lateness
    deadline: float = state["started"] + timeout_s
    state["deadline"] = deadline
    return deadline - lateness.reserve_s(timeout_s)


def read_priority(request: Request) -> bool:
    """Whether `X-Priority` is `bulk`.

    Raises:
        InvalidInputError: neither `bulk` nor `interactive`.
    """
    priority = request.headers.get("x-priority", "interactive")
    if priority not in ("interactive", "bulk"):
        raise InvalidInputError(f"X-Priority is {priority!r}; it can be interactive or bulk")
    return priority == "bulk"
