"""Quotas of API keys: requests and images per second."""

import time
from dataclasses import dataclass, field

from service.errors import QuotaExceededError


@dataclass(slots=True)
class Bucket:
    """A token bucket that holds up to one second's tokens, at least one.

    A larger request is admitted when the bucket is full. Its balance is negative then, which
    delays the requests after it.

    Args:
        per_s: tokens per second.
    """

    per_s: float
    _balance: float = field(init=False)
    _updated: float = field(init=False)

    def __post_init__(self) -> None:
        self._balance = max(1.0, self.per_s)
        self._updated = time.monotonic()

    def take(self, tokens: float) -> float:
        """Take tokens if the bucket has them.

        Returns:
            0 if they were taken, otherwise the seconds until they can be.
        """
        now = time.monotonic()
        full = max(1.0, self.per_s)
        self._balance = min(full, self._balance + (now - self._updated) * self.per_s)
        self._updated = now
        needed = min(tokens, full)
        if self._balance < needed:
            return (needed - self._balance) / self.per_s
        self._balance -= tokens
        return 0.0


class Quotas:
    """The buckets of every key that has quotas."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def take(self, key_id: str, unit: str, per_s: float | None, count: int) -> None:
        """Count against a key's quota.

        Args:
            unit: `requests` or `images`.
            per_s: the quota; None for none.

        Raises:
            QuotaExceededError: the quota is used up.
        """
        if per_s is None:
            return
        bucket = self._buckets.get((key_id, unit))
        if bucket is None:
            bucket = self._buckets[key_id, unit] = Bucket(per_s)
        bucket.per_s = per_s  # which may have changed; what was taken stays taken
        if wait_s := bucket.take(count):
            raise QuotaExceededError(
                f"this key's quota of {per_s:g} {unit} per second is used up", retry_after_s=wait_s
            )

    def keep(self, key_ids: set[str]) -> None:
        """Forget all other keys."""
        self._buckets = {place: b for place, b in self._buckets.items() if place[0] in key_ids}
