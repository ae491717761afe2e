"""Who may use a route: `Authorization: Bearer KEY` or `X-API-Key: KEY`."""

from fastapi import Request

from service.keys import check_admin_key, check_head_key, check_key


def require_key(request: Request) -> None:
    """Let the request pass if keys are off, or if it carries a user's or an admin's key."""
    headers = request.headers
    check_key(request.app.state.settings, headers.get("x-api-key"), headers.get("authorization"))


def require_admin_key(request: Request) -> None:
    """Let the request pass only with an admin key."""
    headers = request.headers
    check_admin_key(
        request.app.state.settings, headers.get("x-api-key"), headers.get("authorization")
    )


def require_head_key(request: Request) -> None:
    """Let the request pass with an admin key; without any configured, as `require_key` does."""
    headers = request.headers
    check_head_key(
        request.app.state.settings, headers.get("x-api-key"), headers.get("authorization")
    )
