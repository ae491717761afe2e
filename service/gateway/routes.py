"""The tasks: one route each, all the same way."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from starlette.requests import ClientDisconnect

from service.backend import Backend
from service.errors import InvalidInputError, ServiceError
from service.gateway.answers_out import predict_response, task_response
from service.gateway.auth import require_key
from service.gateway.images_in import ImagesIn, read_images
from service.gateway.openapi import image_body
from service.metrics import Metrics
from service.parameters import (
    ClassifyParameters,
    EmbedParameters,
    Parameters,
    PredictParameters,
    SegmentParameters,
    TaskParameters,
)
from service.settings import Settings
from service.types import ImageResult, InferRequest, InferResult

router = APIRouter(tags=["tasks"], dependencies=[Depends(require_key)])

P = TypeVar("P", bound=Parameters)
T = TypeVar("T")
Respond = Callable[[Request, P, InferResult], Response]

# Failures of one image among several stay in its entry; these say that nothing was wrong with
# the images, so when all fail the same way the whole answer does.
WHOLE_REQUEST_STATUSES = (429, 500, 503, 504)


@router.post("/classify", openapi_extra=image_body(ClassifyParameters))
async def classify(request: Request) -> Response:
    """Name what the images show: the best classes with their probabilities."""
    return await _serve_task(request, ClassifyParameters)


@router.post("/embed", openapi_extra=image_body(EmbedParameters))
async def embed(request: Request) -> Response:
    """One vector for each image, for retrieval. `Accept: application/x-npy` for one array."""
    return await _serve_task(request, EmbedParameters)


@router.post("/segment", openapi_extra=image_body(SegmentParameters))
async def segment(request: Request) -> Response:
    """A mask of each image's own size. `Accept: image/png` for the first mask itself."""
    return await _serve_task(request, SegmentParameters)


@router.post("/predict", openapi_extra=image_body(PredictParameters))
async def predict(request: Request) -> Response:
    """Ask several models at once; those on one trunk cost one pass."""
    return await _serve(request, PredictParameters, "predict", predict_response)


async def _serve_task(request: Request, parameters: type[TaskParameters]) -> Response:
    return await _serve(request, parameters, str(parameters.task), task_response)


async def _serve(request: Request, parameters: type[P], task: str, respond: Respond[P]) -> Response:
    metrics: Metrics = request.app.state.metrics
    seen = _Seen()
    try:
        received = await read_images(request, parameters)
        seen.models = [call.model or "" for call in received.parameters.calls()]
        result = await _infer(request, received)
        seen.models = [used.name for used in result.models]
        seen.result = result
        _raise_if_all_failed(result)
        return respond(request, received.parameters, result)
    except ServiceError as error:
        seen.outcome = error.outcome
        raise
    except (ClientDisconnect, asyncio.CancelledError):
        seen.outcome = "cancelled"
        raise
    except Exception:
        seen.outcome = "error"
        raise
    finally:
        _count(metrics, request, task, seen)


class _Seen:
    """What is known of a request so far, for the metrics."""

    def __init__(self) -> None:
        self.models: list[str] = []
        self.result: InferResult | None = None
        self.outcome = "ok"


async def _infer(request: Request, received: ImagesIn[P]) -> InferResult:
    """Ask the backend for the images that arrived, and put the others back in their places."""
    backend: Backend = request.app.state.backend
    images = [image for image in received.images if isinstance(image, bytes)]
    calls = received.parameters.calls()
    wanted = InferRequest(
        images=images, calls=calls, deadline=_deadline(request), bulk=_is_bulk(request)
    )
    result = await _while_connected(request, backend.infer(wanted))
    answered = iter(result.images)
    merged = [
        next(answered) if isinstance(image, bytes) else ImageResult(error=image)
        for image in received.images
    ]
    return InferResult(result.models, merged)


def _deadline(request: Request) -> float:
    settings: Settings = request.app.state.settings
    header = request.headers.get("x-timeout-ms")
    try:
        timeout_ms = float(header) if header is not None else settings.default_timeout_ms
    except ValueError:
        timeout_ms = float("nan")
    if not 0 < timeout_ms < float("inf"):
        raise InvalidInputError(f"X-Timeout-Ms is {header!r}; it must be a positive number")
    started: float = request.scope["state"]["started"]
    return started + timeout_ms / 1e3


def _is_bulk(request: Request) -> bool:
    priority = request.headers.get("x-priority", "interactive")
    if priority not in ("interactive", "bulk"):
        raise InvalidInputError(f"X-Priority is {priority!r}; it can be interactive or bulk")
    return priority == "bulk"


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it as soon as the client leaves."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _raise_if_all_failed(result: InferResult) -> None:
    errors = [image.error for image in result.images if image.error is not None]
    if len(errors) < len(result.images):
        return
    if len(errors) == 1 or all(error.status in WHOLE_REQUEST_STATUSES for error in errors):
        raise errors[0]


def _count(metrics: Metrics, request: Request, task: str, seen: _Seen) -> None:
    elapsed = time.monotonic() - request.scope["state"]["started"]
    known = request.app.state.catalog_names
    label = "several" if len(seen.models) > 1 else "".join(seen.models) or "default"
    label = label if label in known or label in ("several", "default") else "unknown"
    metrics.requests.labels(task, label, seen.outcome).inc()
    metrics.request_duration.labels(task, label, seen.outcome).observe(elapsed)
    for image in seen.result.images if seen.result else ():
        for position, used in enumerate(seen.result.models if seen.result else ()):
            output = image.outputs[position] if image.outputs else image.error
            outcome = output.outcome if isinstance(output, ServiceError) else "ok"
            metrics.images.labels(used.task, used.name, outcome).inc()
