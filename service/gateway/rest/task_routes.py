"""The tasks: one route each, all the same way."""

from collections.abc import Callable
from typing import TypeVar

from fastapi import APIRouter, Depends, Request, Response

from service.accounting import counted
from service.errors import ServiceError
from service.gateway.auth import require_key
from service.gateway.dispatch import ask
from service.gateway.rest.body import ImagesIn, read_images
from service.gateway.rest.ndjson import NDJSON, stream_embeddings
from service.gateway.rest.openapi import image_body, parameter_body
from service.gateway.rest.responses import predict_response, task_response
from service.parameters import (
    AttentionParameters,
    ClassifyParameters,
    EmbedParameters,
    GenerateParameters,
    Parameters,
    PredictParameters,
    ReconstructParameters,
    SegmentParameters,
    TaskParameters,
    ZeroShotParameters,
)
from service.types import ImageResult, InferResult

router = APIRouter(tags=["tasks"], dependencies=[Depends(require_key)])

P = TypeVar("P", bound=Parameters)
Respond = Callable[[Request, P, InferResult], Response]


@router.post("/classify", openapi_extra=image_body(ClassifyParameters, videos=True))
async def classify(request: Request) -> Response:
    """Name what the images show: the best classes with their probabilities."""
    return await _serve_task(request, ClassifyParameters)


@router.post("/zero-shot", openapi_extra=image_body(ZeroShotParameters))
async def zero_shot(request: Request) -> Response:
    """Score labels of your own, as texts: all of them, best first."""
    return await _serve_task(request, ZeroShotParameters)


@router.post("/embed", openapi_extra=image_body(EmbedParameters, videos=True))
async def embed(request: Request) -> Response:
    """One vector for each image, or text of `texts`, for retrieval. `Accept: application/x-npy`
    for one array, `application/x-ndjson` for a line each, as they get done."""
    if NDJSON not in request.headers.get("accept", ""):
        return await _serve_task(request, EmbedParameters)
    return await stream_embeddings(request)


@router.post("/segment", openapi_extra=image_body(SegmentParameters))
async def segment(request: Request) -> Response:
    """A mask of each image's own size. `Accept: image/png` for the first mask itself."""
    return await _serve_task(request, SegmentParameters)


@router.post("/attention", openapi_extra=image_body(AttentionParameters))
async def attention(request: Request) -> Response:
    """Where a model looks. `Accept: image/png` or `application/x-npy` for the first one itself."""
    return await _serve_task(request, AttentionParameters)


@router.post("/reconstruct", openapi_extra=image_body(ReconstructParameters))
async def reconstruct(request: Request) -> Response:
    """Hide patches of the images and have a masked autoencoder draw them: everything as drawn, with
    the patches that stayed `pasted` in, and what was `seen`. `Accept: image/png`: the first
    pasted one itself."""
    return await _serve_task(request, ReconstructParameters)


@router.post("/generate", openapi_extra=parameter_body(GenerateParameters))
async def generate(request: Request) -> Response:
    """Draw images from seeds or latent vectors. `Accept: image/png`: the first one itself."""
    return await _serve_task(request, GenerateParameters)


@router.post("/predict", openapi_extra=image_body(PredictParameters, videos=True))
async def predict(request: Request) -> Response:
    """Ask several models at once; those on one trunk cost one pass."""
    return await _serve(request, PredictParameters, "predict", predict_response)


async def _serve_task(request: Request, parameters: type[TaskParameters]) -> Response:
    return await _serve(request, parameters, str(parameters.task), task_response)


async def _serve(request: Request, parameters: type[P], task: str, respond: Respond[P]) -> Response:
    state = request.app.state
    with counted(
        state.metrics, state.backend.knows, task, request.scope["state"]["started"]
    ) as seen:
        received = await read_images(request, parameters)
        seen.models = [call.model or "" for call in received.parameters.calls()]
        result = await _infer(request, received)
        seen.answered(result)
        result.raise_if_all_failed()
        return respond(request, received.parameters, result)


async def _infer(request: Request, received: ImagesIn[P]) -> InferResult:
    """Ask the backend for the inputs that arrived, and put the others back in their places."""
    inputs = [item for item in received.inputs if not isinstance(item, ServiceError)]
    result = await ask(request, inputs, received.parameters.calls())
    answered = iter(result.images)
    merged = [
        ImageResult(error=item) if isinstance(item, ServiceError) else next(answered)
        for item in received.inputs
    ]
    return InferResult(result.models, merged)
