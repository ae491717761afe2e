"""The Open Inference Protocol over REST, with its binary tensor extension."""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from service.backend import Backend
from service.gateway import dispatch
from service.gateway.auth import require_admin_key, require_key
from service.gateway.entrance import refused_early
from service.gateway.open_inference.codec import (
    parse_index_request,
    parse_infer_request,
    write_infer_response,
)
from service.gateway.rest.body import read_body
from service.gateway.rest.examples import INDEX, OPEN_INFERENCE, ModelName, json_body
from service.open_inference.inputs import to_inputs
from service.open_inference.metadata import (
    check_version,
    model_metadata,
    repository_index,
    server_metadata,
)
from service.open_inference.outputs import OutputSelection
from service.types import InferRequest

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
keyed = [Depends(require_key)]
admin = [Depends(require_admin_key)]


def _backend(request: Request) -> Backend:
    backend: Backend = request.app.state.backend
    return backend


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
@refused_early("open-inference")
async def infer(request: Request, name: ModelName, version: str = "") -> Response:
    """Run a model. Inputs: `image` (BYTES, encoded images) or `pixel_values` (FP32)."""
    with dispatch.count_request(request, "open-inference") as account:
        account.models = [name]
        deadline, bulk = dispatch.read_deadline(request), dispatch.read_priority(request)
        check_version(version)
        model = await _backend(request).model(name)
        parsed = await parse_infer_request(request.headers, await read_body(request))
        if parsed.timeout_ms is not None:
            deadline = dispatch.deadline_after(request, parsed.timeout_ms)
        selection = OutputSelection(model, parsed.outputs, parsed.options)
        inputs = to_inputs(parsed.inputs, request.app.state.settings)
        infer_request = InferRequest(
            inputs=inputs, calls=selection.calls, deadline=deadline, bulk=bulk
        )
        result = await dispatch.infer(request, infer_request, account)
        arrays = selection.collect(result)
        return write_infer_response(name, parsed, selection.requested, arrays)


@router.post("/repository/index", dependencies=keyed, openapi_extra=json_body(INDEX))
async def index(request: Request) -> JSONResponse:
    """List every model with its state; with `{"ready": true}` only those that are ready."""
    ready_only = await parse_index_request(await read_body(request))
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
