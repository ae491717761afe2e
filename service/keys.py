"""Who may call what: API keys with scopes, from settings and from a file of hashed keys, and the
credential that gateways send to workers.

Keys are compared by their SHA-256 digests, so the time that it takes tells nothing about a key.
"""

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.errors import PermissionDeniedError, UnauthenticatedError
from service.key_file import SCOPES, Scope, WatchedKeys, digest_key
from service.quotas import Quotas
from service.settings import Settings

# The metadata key of the credential that gateways send to workers.
WORKER_TOKEN = "vitrail-worker-token"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The key that a caller sent, without the key itself.

    Args:
        id: its name in logs.
        requests_per_s, images_per_s: its quotas; None for none.
    """

    id: str
    scopes: frozenset[Scope]
    requests_per_s: float | None = None
    images_per_s: float | None = None

    def permits(self, scope: Scope) -> bool:
        """Whether the key has the scope. `admin` includes all others."""
        return scope in self.scopes or "admin" in self.scopes


class Keys:
    """Checks the keys of one process's callers, and counts their quotas."""

    def __init__(self, settings: Settings, *, worker: bool = False) -> None:
        """
        Args:
            worker: whether the callers are gateways, who send the workers' credential instead.

        Raises:
            OSError: the file of keys cannot be read.
        """
        self._settings = settings
        self.for_gateways = worker
        self._fixed = {digest_key(secret): key for secret, key in _from_settings(settings)}
        self._tokens = dict(_worker_tokens(settings)) if worker else {}
        self._quotas = Quotas()
        self._file: WatchedKeys | None = None
        if settings.keys_file:
            self._file = WatchedKeys(Path(settings.keys_file), self._on_change)

    def authorize(
        self, scope: Scope, api_key: str | None, authorization: str | None, token: str | None = None
    ) -> ApiKey | None:
        """The caller's key, after a check of its scope and its quota of requests.

        Args:
            api_key: the value of `X-API-Key`.
            authorization: the value of `Authorization`; only `Bearer KEY` is read.
            token: the workers' credential, if the caller sent one.

        Returns:
            The key; None if the scope is open and no known key was sent.

        Raises:
            ServiceError: as `check`, or the key's quota of requests is used up.
        """
        key = self.check(scope, api_key, authorization, token)
        self.count_request(key)
        return key

    def check(
        self, scope: Scope, api_key: str | None, authorization: str | None, token: str | None = None
    ) -> ApiKey | None:
        """As `authorize`, without counting a request.

        Raises:
            UnauthenticatedError: no key.
            PermissionDeniedError: an unknown or expired key, one without the scope, or the scope is
                turned off.
        """
        if scope == "admin" and not self._has_admins:
            raise PermissionDeniedError(
                "admin calls are off; set VITRAIL_ADMIN_KEYS or VITRAIL_KEYS_FILE to enable them"
            )
        sent = read_key(api_key, authorization)
        key = self._find(sent, token)
        if self._guards(scope):
            if not sent and not token:
                raise UnauthenticatedError(
                    "send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
                )
            if key is None or not key.permits(scope):
                raise PermissionDeniedError("this API key does not permit the call")
        return key

    def count_request(self, key: ApiKey | None) -> None:
        """Count a request that came without a call of its own, as those of streams do.

        Raises:
            QuotaExceededError: the key's quota of requests is used up.
        """
        if key is not None:
            self._quotas.take(key.id, "requests", key.requests_per_s, 1)

    def count_images(self, key: ApiKey | None, images: int) -> None:
        """Count the images of a request, before they are decoded.

        Raises:
            QuotaExceededError: the key's quota of images is used up.
        """
        if key is not None:
            self._quotas.take(key.id, "images", key.images_per_s, images)

    def is_gateway(self, token: str | None) -> bool:
        """Whether to believe a caller that says it is a gateway: only a worker does, and only if
        the caller sent the workers' credential or none is configured. Then its network must be
        closed to others: who is believed names the clients for whom the budget is shared out."""
        if not self.for_gateways or not self._tokens:
            return self.for_gateways
        return token is not None and digest_key(token) in self._tokens

    @property
    def _has_admins(self) -> bool:
        admin_token = any(key.permits("admin") for key in self._tokens.values())
        return bool(self._settings.admin_keys or self._file) or admin_token

    def _guards(self, scope: Scope) -> bool:
        """Whether calls of that scope need a key."""
        settings = self._settings
        if scope == "admin" or self._file is not None:
            return True
        if scope == "metrics":
            return False
        closed = bool(settings.api_keys) or bool(self._tokens and settings.worker_token)
        return closed or (scope == "heads" and bool(settings.admin_keys))

    def _find(self, sent: str, token: str | None) -> ApiKey | None:
        if token and (key := self._tokens.get(digest_key(token))):
            return key
        if not sent:
            return None
        if key := self._fixed.get(digest_key(sent)):
            return key
        record = self._file.find(sent) if self._file is not None else None
        if record is None or record.expired:
            return None
        return ApiKey(
            record.id, frozenset(record.scopes), record.requests_per_s, record.images_per_s
        )

    def _on_change(self) -> None:
        assert self._file is not None
        self._quotas.keep({record.id for record in self._file.by_digest.values()})


def worker_token(settings: Settings) -> str | None:
    """The credential that a gateway sends to its workers: `VITRAIL_WORKER_TOKEN`, or else one made
    from its first admin or API key, so that the key itself is not sent. None without any."""
    if settings.worker_token is not None:
        return settings.worker_token.get_secret_value()
    keys = settings.admin_keys or settings.api_keys
    return _derive(keys[0].get_secret_value()) if keys else None


def _worker_tokens(settings: Settings) -> Iterator[tuple[str, ApiKey]]:
    """The digests of the credentials that a worker accepts, each with what it permits. One that is
    made from a key permits what the key does."""
    if settings.worker_token is not None:
        secret = settings.worker_token.get_secret_value()
        yield digest_key(secret), ApiKey("worker-token", frozenset(SCOPES))
        return
    for secret, key in _from_settings(settings):
        yield digest_key(_derive(secret)), ApiKey("gateway", key.scopes)


def _from_settings(settings: Settings) -> Iterator[tuple[str, ApiKey]]:
    user: set[Scope] = {"infer", "collections"}
    if not settings.admin_keys and not settings.keys_file:
        user.add("heads")
    for number, key in enumerate(settings.api_keys, 1):
        yield key.get_secret_value(), ApiKey(f"api-key-{number}", frozenset(user))
    for number, key in enumerate(settings.admin_keys, 1):
        yield key.get_secret_value(), ApiKey(f"admin-key-{number}", frozenset(SCOPES))


def _derive(secret: str) -> str:
    return hmac.new(secret.encode(), b"vitrail worker token", hashlib.sha256).hexdigest()


def read_key(api_key: str | None, authorization: str | None) -> str:
    scheme, _, bearer = (authorization or "").partition(" ")
    if api_key is None and scheme.lower() == "bearer":
        return bearer.strip()
    return api_key or ""
