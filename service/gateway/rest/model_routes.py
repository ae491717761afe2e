"""The models of the catalog: listed, described, loaded and unloaded."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from service.gateway.auth import require_admin_key, require_key

router = APIRouter(tags=["models"])


@router.get("/models", dependencies=[Depends(require_key)])
async def list_models(request: Request) -> dict[str, list[dict[str, Any]]]:
    """List every model of the catalog, with its state."""
    return {"models": list(await request.app.state.backend.models())}


@router.get("/models/{name}", dependencies=[Depends(require_key)])
async def get_model(request: Request, name: str) -> dict[str, Any]:
    """Describe a model: task, trunk, state, source, format, dtype, memory, preprocess, licence."""
    described: dict[str, Any] = await request.app.state.backend.model(name)
    return described


@router.post("/models/{name}/load", dependencies=[Depends(require_admin_key)])
async def load_model(request: Request, name: str) -> dict[str, Any]:
    """Load a model; returns when it is ready. Needs an admin key."""
    described: dict[str, Any] = await request.app.state.backend.load(name)
    return described


@router.post("/models/{name}/unload", dependencies=[Depends(require_admin_key)])
async def unload_model(request: Request, name: str) -> dict[str, Any]:
    """Unload a model when its accepted requests are done. Needs an admin key."""
    described: dict[str, Any] = await request.app.state.backend.unload(name)
    return described
