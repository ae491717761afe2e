"""The models of the catalog: listed, described, loaded and unloaded."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from service.backend import Backend
from service.gateway.auth import require_admin_key, require_key
from service.gateway.rest.examples import ModelName

router = APIRouter(tags=["models"])


@router.get("/models", dependencies=[Depends(require_key)])
async def list_models(request: Request) -> dict[str, list[dict[str, Any]]]:
    """List every model of the catalog, with its state."""
    return {"models": [model.to_json() for model in await _backend(request).models()]}


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
