"""Route dependencies that check `Authorization: Bearer KEY` or `X-API-Key: KEY`.

They are coroutines because FastAPI runs other functions in threads.
"""

from fastapi import Request

from service.keys import check_admin_key, check_head_key, check_key


async def require_key(request: Request) -> None:
    """Require a user's or an admin's key, if user keys are configured."""
    headers = request.headers
    check_key(request.app.state.settings, headers.get("x-api-key"), headers.get("authorization"))


async def require_admin_key(request: Request) -> None:
    """Require an admin key."""
    headers = request.headers
    check_admin_key(
        request.app.state.settings, headers.get("x-api-key"), headers.get("authorization")
    )


async def require_head_key(request: Request) -> None:
    """Require an admin key if any is configured, otherwise the same as `require_key`."""
    headers = request.headers
    check_head_key(
        request.app.state.settings, headers.get("x-api-key"), headers.get("authorization")
    )
