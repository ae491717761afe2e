"""API keys, compared in constant time."""

import hmac

from pydantic import SecretStr

from service.errors import PermissionDeniedError, UnauthenticatedError
from service.settings import Settings


def check_key(settings: Settings, api_key: str | None, authorization: str | None) -> None:
    """Pass if keys are off, or if a user's or an admin's key was given.

    Args:
        api_key: the value of `X-API-Key`.
        authorization: the value of `Authorization`, of which `Bearer KEY` counts.

    Raises:
        UnauthenticatedError: no key.
        PermissionDeniedError: another key.
    """
    if settings.api_keys:
        _check((*settings.api_keys, *settings.admin_keys), api_key, authorization)


def check_admin_key(settings: Settings, api_key: str | None, authorization: str | None) -> None:
    """Pass only with an admin key; without any configured, never."""
    if not settings.admin_keys:
        raise PermissionDeniedError("admin calls are off; set VITRAIL_ADMIN_KEYS to use them")
    _check(settings.admin_keys, api_key, authorization)


def check_head_key(settings: Settings, api_key: str | None, authorization: str | None) -> None:
    """Pass with an admin key; without any configured, as `check_key` does. Raises as those do."""
    check = check_admin_key if settings.admin_keys else check_key
    check(settings, api_key, authorization)


def _check(keys: tuple[SecretStr, ...], api_key: str | None, authorization: str | None) -> None:
    scheme, _, token = (authorization or "").partition(" ")
    given = api_key if api_key is not None or scheme.lower() != "bearer" else token.strip()
    if not given:
        raise UnauthenticatedError("send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
    # every key is compared, so that the time taken says nothing of which one came close
    matches = [hmac.compare_digest(given.encode(), key.get_secret_value().encode()) for key in keys]
    if not any(matches):
        raise PermissionDeniedError("this API key may not do that")
