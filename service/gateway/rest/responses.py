"""A backend's result as a response: JSON, or a task's other media types."""

import time
from typing import Any

from fastapi import Request, Response

from models.tasks.base import Arrays, Task
from models.tasks.table import get_task
from service.errors import ServiceError
from service.gateway.json_response import JsonResponse
from service.gateway.problems import describe
from service.parameters import PredictParameters, TaskParameters
from service.types import ImageResult, InferResult, ModelUsed


def task_response(
    request: Request, task: Task, parameters: TaskParameters, result: InferResult
) -> Response:
    """The response of a task's route: the first of `task.bodies` that is accepted, or JSON.

    Raises:
        ServiceError: an input of the accepted body failed. Only JSON can report it in its place.
    """
    options = parameters.render_options()
    accept = request.headers.get("accept", "")
    for body in task.bodies:
        if body.media_type in accept:
            images = result.images[:1] if body.first_only else result.images
            content = body.encode([_arrays(image) for image in images], **options)
            if content is not None:
                return Response(content, media_type=body.media_type)
    used = result.models[0]
    entries = [
        {"error": describe(output)}
        if isinstance(output, ServiceError)
        else task.render(output, **options)
        for output in map(first_output, result.images)
    ]
    answer = {"model": used.name, "results": entries}
    answer |= task.members(_first_arrays(result)) | digests(task, used)
    return _json(request, answer, result, parameters.timing)


def predict_response(
    request: Request, parameters: PredictParameters, result: InferResult
) -> Response:
    """The response of `/predict`: for every input, what each model's own task returns."""
    names = [used.name for used in result.models]
    entries = [_predict_entry(result, image) for image in result.images]
    answer = {"model": ",".join(names), "models": names, "results": entries}
    return _json(request, answer, result, parameters.timing)


def first_output(image: ImageResult) -> Arrays | ServiceError:
    """The output of a request's only call for an input, or its error."""
    return image.error or image.outputs[0]


def digests(task: Task, used: ModelUsed) -> dict[str, str]:
    """The members that identify the model and its preprocessing, if the task has them."""
    if not task.digests:
        return {}
    return {"model_digest": used.model_digest, "preprocess_digest": used.preprocess_digest}


def _predict_entry(result: InferResult, image: ImageResult) -> dict[str, Any]:
    if image.error is not None:
        return {"error": describe(image.error)}
    return {
        "outputs": {
            used.name: {"error": describe(output)}
            if isinstance(output, ServiceError)
            else get_task(used.task).render(output)
            for used, output in zip(result.models, image.outputs, strict=True)
        }
    }


def _arrays(image: ImageResult) -> Arrays:
    output = first_output(image)
    if isinstance(output, ServiceError):
        raise output
    return output


def _first_arrays(result: InferResult) -> Arrays | None:
    outputs = map(first_output, result.images)
    return next((output for output in outputs if not isinstance(output, ServiceError)), None)


def _json(request: Request, answer: dict[str, Any], result: InferResult, timing: bool) -> Response:
    if timing:
        started: float = request.scope["state"]["started"]
        answer["timing"] = _timing(result, time.monotonic() - started)
    return JsonResponse(answer)


def _timing(result: InferResult, total_s: float) -> dict[str, float]:
    """Milliseconds of the slowest input in each stage, and of the whole request."""
    timings = [image.timing for image in result.images if image.timing]
    return {
        "decode": round(max((t.decode_ms for t in timings), default=0.0), 3),
        "queue": round(max((t.queue_ms for t in timings), default=0.0), 3),
        "compute": round(max((t.compute_ms for t in timings), default=0.0), 3),
        "total": round(total_s * 1e3, 3),
        "batch_size": max((t.batch_size for t in timings), default=0),
    }
