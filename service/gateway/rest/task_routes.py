"""One route for each task of the table, and `/predict` for several models."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Depends, Request, Response

from models.tasks.base import Task
from models.tasks.table import tasks
from service.gateway import dispatch
from service.gateway.auth import require_key
from service.gateway.dialects import immich
from service.gateway.entrance import NDJSON, refused_early
from service.gateway.json_response import made_of
from service.gateway.rest.body import read_request
from service.gateway.rest.content import read_body
from service.gateway.rest.examples import PREDICT
from service.gateway.rest.ndjson import stream_task
from service.gateway.rest.openapi import image_body, task_body, task_description
from service.gateway.rest.responses import predict_response, task_response
from service.parameters import PredictParameters, task_parameters

router = APIRouter(tags=["tasks"], dependencies=[Depends(require_key)])


def _endpoint(task: Task) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        if NDJSON in request.headers.get("accept", ""):
            return await stream_task(request, task)
        return await _answer_task(request, task)

    return refused_early(task.name)(endpoint)


async def _answer_task(request: Request, task: Task) -> Response:
    with dispatch.count_request(request, task.name) as account:
        parameters, infer_request = await read_request(request, task_parameters(task.name))
        result = await dispatch.infer(request, infer_request, account)
        result.raise_if_all_failed()
        return await made_of(request, result, task_response, request, task, parameters, result)


for _task in tasks().values():
    router.add_api_route(
        f"/{_task.name}",
        _endpoint(_task),
        methods=["POST"],
        name=_task.name.replace("-", "_"),
        description=task_description(_task),
        openapi_extra=task_body(_task),
    )


@router.post("/predict", openapi_extra=image_body(PredictParameters, PREDICT, videos=True))
@refused_early("predict")
async def predict(request: Request) -> Response:
    """Run several models on the same images. Models on one trunk share a pass."""
    with dispatch.count_request(request, "predict") as account:
        body = await read_body(request)
        if immich.is_form(body):
            return await immich.answer(request, body, account)
        parameters, infer_request = await read_request(request, PredictParameters, body)
        result = await dispatch.infer(request, infer_request, account)
        result.raise_if_all_failed()
        return await made_of(request, result, predict_response, request, parameters, result)
