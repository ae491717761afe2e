"""Route dependencies that check `Authorization: Bearer KEY` or `X-API-Key: KEY`.

They are coroutines because FastAPI runs other functions in threads.
"""

from fastapi import Request

from service.clients import client, identify
from service.key_file import Scope
from service.keys import Keys


async def require_key(request: Request) -> None:
    """Require a key with the scope `infer`, if keys are configured."""
    _authorize(request, "infer")


async def require_head_key(request: Request) -> None:
    """Require the scope `heads`, if keys are configured. The call is audited."""
    request.scope["state"]["audited"] = True
    _authorize(request, "heads")


async def require_collection_key(request: Request) -> None:
    """Require the scope `collections`, if keys are configured."""
    _authorize(request, "collections")


async def require_admin_key(request: Request) -> None:
    """Require the scope `admin`, which is off without keys. The call is audited."""
    request.scope["state"]["audited"] = True
    _authorize(request, "admin")


async def require_metrics_key(request: Request) -> None:
    """Require the scope `metrics`, if there is a file of keys."""
    _authorize(request, "metrics")


def count_images(request: Request, images: int) -> None:
    """Count images against the quota of the caller's key.

    Raises:
        QuotaExceededError: it is used up.
    """
    keys: Keys = request.app.state.keys
    keys.count_images(request.scope["state"].get("key"), images)


def _authorize(request: Request, scope: Scope) -> None:
    keys: Keys = request.app.state.keys
    headers = request.headers
    key = keys.authorize(scope, headers.get("x-api-key"), headers.get("authorization"))
    request.scope["state"]["key"] = key
    client.set(identify(key, request.client.host if request.client else ""))
