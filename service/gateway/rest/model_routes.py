"""The models of the catalog: listed, described, loaded and unloaded."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from service.backend import Backend
from service.gateway.auth import require_admin_key, require_key
from service.gateway.rest.examples import ModelName

router = APIRouter(tags=["models"])

MAX = 2**31


@router.get("/models", dependencies=[Depends(require_key)])
async def list_models(
    request: Request,
    start: Annotated[int, Query(ge=0, le=MAX, description="Leave out so many models.")] = 0,
    count: Annotated[
        int | None, Query(ge=1, le=MAX, description="The most models; all if absent.")
    ] = None,
) -> dict[str, list[dict[str, Any]] | int]:
    """List the models of the catalog, with their states. With `count`, the answer has a member
    `next` if there are more: the `start` of the following request."""
    models = await _backend(request).models(start, None if count is None else count + 1)
    answer: dict[str, list[dict[str, Any]] | int]
    answer = {"models": [model.to_json() for model in models[:count]]}
    if count is not None and len(models) > count:
        answer["next"] = start + count
    return answer


@router.get("/models/{name}", dependencies=[Depends(require_key)])
async def get_model(request: Request, name: ModelName) -> dict[str, Any]:
    """Describe a model: task, trunk, state, source, format, dtype, memory, preprocess, licence."""
    return (await _backend(request).model(name)).to_json()


@router.post("/models/{name}/load", dependencies=[Depends(require_admin_key)])
async def load_model(request: Request, name: ModelName) -> dict[str, Any]:
    """Load a model; returns when it is ready. Needs an admin key."""
    return (await _backend(request).load(name)).to_json()


@router.post("/models/{name}/unload", dependencies=[Depends(require_admin_key)])
async def unload_model(request: Request, name: ModelName) -> dict[str, Any]:
    """Unload a model when its accepted requests are done. Needs an admin key."""
    return (await _backend(request).unload(name)).to_json()


def _backend(request: Request) -> Backend:
    backend: Backend = request.app.state.backend
    return backend
