"""A backend's result as the answer that the client asked for: JSON, `.npy` or a PNG."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import Request, Response

from models.tasks.embed import quantize
from models.tasks.rendering import npy
from models.tasks.table import get_task
from service.errors import ServiceError
from service.gateway.problems import describe
from service.parameters import PredictParameters, TaskParameters
from service.types import ImageResult, InferResult

NPY = "application/x-npy"
PNG = "image/png"
# Tasks whose answer may be a picture itself, and which of its arrays that is.
PICTURED = ("segment", "attention", "reconstruct", "generate")
PICTURES = ("png", "overlay", "map", "pasted")


def task_response(request: Request, parameters: TaskParameters, result: InferResult) -> Response:
    """The answer of a route that asks one model."""
    used = result.models[0]
    accept = request.headers.get("accept", "")
    if used.task == "embed" and NPY in accept:
        vectors = np.stack([arrays["embedding"] for arrays in _all_arrays(result)])
        encoding = getattr(parameters, "encoding", "float")
        return Response(npy(quantize(vectors, encoding)).tobytes(), media_type=NPY)
    for media, names in ((PNG, PICTURES), (NPY, ("npy", "logits"))):
        if used.task in PICTURED and media in accept:
            first = _first(result.images)
            if (name := next((name for name in names if name in first), None)) is not None:
                return Response(first[name].tobytes(), media_type=media)
    encoding = getattr(parameters, "encoding", "float")
    entries = [_entry(used.task, image, encoding) for image in result.images]
    answer: dict[str, Any] = {"model": used.name, "results": entries}
    if used.task == "embed":
        answer["dimensions"] = _dimensions(result)
        answer["model_digest"] = used.model_digest
        answer["preprocess_digest"] = used.preprocess_digest
    return _json(request, answer, result, parameters.timing)


def predict_response(
    request: Request, parameters: PredictParameters, result: InferResult
) -> Response:
    """The answer of `/predict`: every model's own answer for every image."""
    names = [used.name for used in result.models]
    entries = [_predict_entry(result, image) for image in result.images]
    answer = {"model": ",".join(names), "models": names, "results": entries}
    return _json(request, answer, result, parameters.timing)


def _predict_entry(result: InferResult, image: ImageResult) -> dict[str, Any]:
    if image.error is not None:
        return {"error": describe(image.error)}
    return {
        "outputs": {
            used.name: _output(used.task, output, "float")
            for used, output in zip(result.models, image.outputs, strict=True)
        }
    }


def _entry(task: str, image: ImageResult, encoding: str) -> dict[str, Any]:
    if image.error is not None:
        return {"error": describe(image.error)}
    return _output(task, image.outputs[0], encoding)


def _output(
    task: str, output: Mapping[str, np.ndarray] | ServiceError, encoding: str
) -> dict[str, Any]:
    if isinstance(output, ServiceError):
        return {"error": describe(output)}
    return get_task(task).render(output, **({"encoding": encoding} if task == "embed" else {}))


def _dimensions(result: InferResult) -> int | None:
    for image in result.images:
        if image.error is None and not isinstance(image.outputs[0], ServiceError):
            return len(image.outputs[0]["embedding"])
    return None


def _first(images: Sequence[ImageResult]) -> Mapping[str, np.ndarray]:
    if images[0].error is not None:
        raise images[0].error
    output = images[0].outputs[0]
    if isinstance(output, ServiceError):
        raise output
    return output


def _all_arrays(result: InferResult) -> list[Mapping[str, np.ndarray]]:
    """Every image's arrays; an array cannot tell of a failed row, so one failure fails all."""
    return [_first([image]) for image in result.images]


def _json(request: Request, answer: dict[str, Any], result: InferResult, timing: bool) -> Response:
    if timing:
        answer["timing"] = _timing(request, result)
    return Response(
        json.dumps(answer, separators=(",", ":"), allow_nan=False), media_type="application/json"
    )


def _timing(request: Request, result: InferResult) -> dict[str, float]:
    """Milliseconds of the slowest image in each stage, and of the whole request."""
    timings = [image.timing for image in result.images if image.timing]
    total = (time.monotonic() - request.scope["state"]["started"]) * 1e3
    return {
        "decode": round(max((t.decode_ms for t in timings), default=0.0), 3),
        "queue": round(max((t.queue_ms for t in timings), default=0.0), 3),
        "compute": round(max((t.compute_ms for t in timings), default=0.0), 3),
        "total": round(total, 3),
        "batch_size": max((t.batch_size for t in timings), default=0),
    }
