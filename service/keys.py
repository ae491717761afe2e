"""API keys, compared in constant time."""

import hmac

from pydantic import SecretStr

from service.errors import PermissionDeniedError, UnauthenticatedError
from service.settings import Settings


def check_key(settings: Settings, api_key: str | None, authorization: str | None) -> None:
    """Check for a user's or an admin's key, if user keys are configured.

    Args:
        api_key: the value of `X-API-Key`.
        authorization: the value of `Authorization`; only `Bearer KEY` is read.

    Raises:
        UnauthenticatedError: no key.
        PermissionDeniedError: an unknown key.
    """
    if settings.api_keys:
        _check((*settings.api_keys, *settings.admin_keys), api_key, authorization)


def check_admin_key(settings: Settings, api_key: str | None, authorization: str | None) -> None:
    """Check for an admin key.

    Raises:
        UnauthenticatedError: no key.
        PermissionDeniedError: another key, or no admin key is configured.
    """
    if not settings.admin_keys:
        raise PermissionDeniedError("admin calls are off; set VITRAIL_ADMIN_KEYS to enable them")
    _check(settings.admin_keys, api_key, authorization)


def check_head_key(settings: Settings, api_key: str | None, authorization: str | None) -> None:
    """Check for an admin key if one is configured, otherwise as `check_key`. Raises as they do."""
    check = check_admin_key if settings.admin_keys else check_key
    check(settings, api_key, authorization)


def _check(keys: tuple[SecretStr, ...], api_key: str | None, authorization: str | None) -> None:
    scheme, _, token = (authorization or "").partition(" ")
    candidate = api_key if api_key is not None or scheme.lower() != "bearer" else token.strip()
    if not candidate:
        raise UnauthenticatedError("send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
    # Every key is compared, so that the time taken does not depend on which one matches.
    encoded = candidate.encode()
    matches = [hmac.compare_digest(encoded, key.get_secret_value().encode()) for key in keys]
    if not any(matches):
        raise PermissionDeniedError("this API key does not permit the call")
