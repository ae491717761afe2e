"""API keys: `Authorization: Bearer KEY` or `X-API-Key: KEY`, compared in constant time."""

import hmac
from collections.abc import Sequence

from fastapi import Request
from pydantic import SecretStr

from service.errors import PermissionDeniedError, UnauthenticatedError


def require_key(request: Request) -> None:
    """Let the request pass if keys are off, or if it carries a user's or an admin's key."""
    settings = request.app.state.settings
    if settings.api_keys:
        _check(request, (*settings.api_keys, *settings.admin_keys))


def require_admin_key(request: Request) -> None:
    """Let the request pass only with an admin key."""
    settings = request.app.state.settings
    if not settings.admin_keys:
        raise PermissionDeniedError("admin routes are off; set VITRAIL_ADMIN_KEYS to use them")
    _check(request, settings.admin_keys)


def _check(request: Request, keys: Sequence[SecretStr]) -> None:
    given = request.headers.get("x-api-key")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if given is None and scheme.lower() == "bearer":
        given = token.strip()
    if not given:
        raise UnauthenticatedError("send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
    # every key is compared, so that the time taken says nothing of which one came close
    matches = [hmac.compare_digest(given.encode(), key.get_secret_value().encode()) for key in keys]
    if not any(matches):
        raise PermissionDeniedError("this API key may not do that")
