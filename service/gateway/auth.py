"""Route dependencies that check `Authorization: Bearer KEY` or `X-API-Key: KEY`.

They are coroutines because FastAPI runs other functions in threads.
"""

from fastapi import Request

from service.clients import client, identify
from service.key_file import Scope
from service.keys import Keys


async def require_key(request: Request) -> None:
    """Require a key with the scope `infer`, if keys are configured."""
    authorize(request, "infer")


async def require_head_key(request: Request) -> None:
    """Require the scope `heads`, if keys are configured. The call is audited."""
    request.scope["state"]["audited"] = True
    authorize(request, "heads")


async def require_collection_key(request: Request) -> None:
    """Require the scope `collections`, if keys are configured."""
    authorize(request, "collections")


async def require_admin_key(request: Request) -> None:
    """Require the scope `admin`, which is off without keys. The call is audited."""
    request.scope["state"]["audited"] = True
    authorize(request, "admin")


async def require_metrics_key(request: Request) -> None:
    """Require the scope `metrics`, if there is a file of keys."""
    authorize(request, "metrics")


def count_images(request: Request, images: int) -> None:
    """Count images against the quota of the caller's key.

    Raises:
        QuotaExceededError: it is used up.
    """
    keys: Keys = request.app.state.keys
    keys.count_images(request.scope["state"].get("key"), images)


def authorize(request: Request, scope: Scope) -> None:
    """Check the caller's key, once: `Entrance` does it before the route's dependency.

    Raises:
        ServiceError: the key does not permit the call, or its quota is used up.
    """
    state = request.scope["state"]
    if state.get("authorized") == scope:
        return
    keys: Keys = request.app.state.keys
    headers = request.headers
    key = keys.authorize(scope, headers.get("x-api-key"), headers.get("authorization"))
    state["key"], state["authorized"] = key, scope
    client.set(identify(key, request.client.host if request.client else ""))
