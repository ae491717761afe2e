"""The Open Inference Protocol over REST, with its binary tensor extension."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from models.description import ModelDescription
from service.backend import Backend
from service.gateway import dispatch
from service.gateway.auth import require_admin_key, require_key
from service.gateway.entrance import refused_early
from service.gateway.json_response import made_of
from service.gateway.open_inference.codec import (
    parse_index_request,
    parse_infer_request,
    write_infer_response,
)
from service.gateway.open_inference.compression import compressed
from service.gateway.open_inference.memory_routes import memory_of
from service.gateway.rest.content import read_body, share_of
from service.gateway.rest.examples import INDEX, OPEN_INFERENCE, ModelName, json_body
from service.metrics import Metrics
from service.open_inference.inputs import read_inputs
from service.open_inference.metadata import (
    check_version,
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
)
from service.open_inference.outputs import OutputSelection
from service.open_inference.shared_memory import Place
from service.settings import Settings
from service.types import InferRequest

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
keyed = [Depends(require_key)]
admin = [Depends(require_admin_key)]


def _backend(request: Request) -> Backend:
    backend: Backend = request.app.state.backend
    return backend


async def _read(request: Request, place: Place) -> bytes:
    """An input in shared memory, which counts towards the request's bytes."""
    settings: Settings = request.app.state.settings
    share_of(request).add(place.byte_size)
    return await memory_of(request).read(place, settings.max_request_bytes)


def _statistics(request: Request, models: Sequence[ModelDescription]) -> dict[str, Any]:
    metrics: Metrics = request.app.state.metrics
    return {"model_stats": model_statistics(models, metrics.statistics)}


@router.get("")
async def metadata() -> dict[str, Any]:
    """Describe the server: its name, version and extensions."""
    return server_metadata()


@router.get("/health/live", response_class=Response)
async def live(request: Request) -> Response:
    """200 unless a restart is needed."""
    return Response(status_code=200 if _backend(request).health().live else 503)


@router.get("/health/ready", response_class=Response)
async def ready(request: Request) -> Response:
    """200 when every start-up model is ready."""
    return Response(status_code=200 if _backend(request).health().ready else 503)


@router.get("/models/stats", dependencies=keyed)
async def all_statistics(request: Request) -> dict[str, Any]:
    """What every model has done since this process started."""
    return _statistics(request, await _backend(request).models())


@router.get("/models/{name}", dependencies=keyed)
@router.get("/models/{name}/versions/{version}", dependencies=keyed)
async def model(request: Request, name: ModelName, version: str = "") -> dict[str, Any]:
    """Describe a model's inputs and outputs."""
    check_version(version)
    return model_metadata(await _backend(request).model(name))


@router.get("/models/{name}/ready", dependencies=keyed, response_class=Response)
@router.get("/models/{name}/versions/{version}/ready", dependencies=keyed, response_class=Response)
async def model_ready(request: Request, name: ModelName, version: str = "") -> Response:
    """200 when the model is ready."""
    check_version(version)
    ready = (await _backend(request).model(name)).is_ready
    return Response(status_code=200 if ready else 503)


@router.post("/models/{name}/infer", dependencies=keyed, openapi_extra=json_body(OPEN_INFERENCE))
@router.post(
    "/models/{name}/versions/{version}/infer",
    dependencies=keyed,
    openapi_extra=json_body(OPEN_INFERENCE),
)
@refused_early("open-inference", in_path=True)
async def infer(request: Request, name: ModelName, version: str = "") -> Response:
    """Run a model. Inputs: `image` (BYTES, encoded images) or `pixel_values` (FP32)."""
    with dispatch.count_request(request, "open-inference") as account:
        account.models = [name]
        deadline, bulk = dispatch.read_deadline(request), dispatch.read_priority(request)
        check_version(version)
        model = await _backend(request).model(name)
        share = share_of(request)
        parsed = await parse_infer_request(
            request.headers, await read_body(request), partial(_read, request), share
        )
        made_of_json = share.made_bytes
        if parsed.timeout_ms is not None:
            deadline = dispatch.deadline_after(request, parsed.timeout_ms)
        if parsed.bulk is not None:
            bulk = parsed.bulk
        selection = OutputSelection(model, parsed.outputs, parsed.options)
        inputs = await read_inputs(parsed.inputs, request.app.state.settings, share)
        if not isinstance(inputs[0], str):  # else these are what JSON made
            parsed = replace(parsed, inputs=())  # whose values are not kept
            share.give_back_made(made_of_json)
        infer_request = InferRequest(
            inputs=inputs, calls=selection.calls, deadline=deadline, bulk=bulk
        )
        result = await dispatch.infer(request, infer_request, account)
        placed: list[tuple[Place, bytes]] = []

        def respond() -> Response:
            arrays = selection.collect(result)
            return write_infer_response(name, parsed, selection.requested, arrays, placed)

        response = await made_of(request, result, respond)
        for place, content in placed:
            await memory_of(request).write(place, content)
        return await compressed(response, request.headers.get("accept-encoding", ""))


@router.get("/models/{name}/stats", dependencies=keyed)
@router.get("/models/{name}/versions/{version}/stats", dependencies=keyed)
async def statistics(request: Request, name: ModelName, version: str = "") -> dict[str, Any]:
    """What a model has done since this process started: requests, passes, nanoseconds."""
    check_version(version)
    return _statistics(request, [await _backend(request).model(name)])


@router.get("/models/{name}/config", dependencies=keyed)
@router.get("/models/{name}/versions/{version}/config", dependencies=keyed)
async def config(request: Request, name: ModelName, version: str = "") -> dict[str, Any]:
    """A model's configuration, as far as Triton's applies."""
    check_version(version)
    settings: Settings = request.app.state.settings
    return model_config(await _backend(request).model(name), settings.max_images)


@router.post("/repository/index", dependencies=keyed, openapi_extra=json_body(INDEX))
async def index(request: Request) -> JSONResponse:
    """List every model with its state; with `{"ready": true}` only those that are ready."""
    ready_only = await parse_index_request(await read_body(request), share_of(request))
    return JSONResponse(repository_index(await _backend(request).models(), ready_only))


@router.post("/repository/models/{name}/load", dependencies=admin, response_class=Response)
async def load(request: Request, name: ModelName) -> Response:
    """Load a model; returns when it is ready. Needs an admin key."""
    await _backend(request).load(name)
    return Response()


@router.post("/repository/models/{name}/unload", dependencies=admin, response_class=Response)
async def unload(request: Request, name: ModelName) -> Response:
    """Unload a model. Needs an admin key."""
    await _backend(request).unload(name)
    return Response()
