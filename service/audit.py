"""The audit log: who changed keys, models and heads, and who tried to.

Its lines have the logger `vitrail.audit`, and are written whatever `VITRAIL_LOG_LEVEL` is.
"""

import logging

from service.keys import ApiKey

logger = logging.getLogger("vitrail.audit")


def audit(action: str, *, status: int | str, client: str, key: ApiKey | None) -> None:
    """Log a change, or an attempt that was refused.

    Args:
        action: the method and path, or the gRPC method.
        status: of the answer.
        client: the caller's address.
        key: None if the caller had no valid key.
    """
    logger.info("%s", action, extra={"status": status, "client": client, **key_field(key)})


def key_field(key: ApiKey | None) -> dict[str, str]:
    """The field of a log line that names the caller's key."""
    return {} if key is None else {"key": key.id}
