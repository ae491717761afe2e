"""Around every call: its id, its key, its deadline, and its errors as gRPC states them."""

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from service.backend import Backend
from service.errors import InternalError, InvalidInputError, PayloadTooLargeError, ServiceError
from service.keys import check_admin_key, check_head_key, check_key
from service.logs import request_id
from service.metrics import Metrics
from service.rpc.wire import to_error
from service.settings import Settings

logger = logging.getLogger("vitrail.access")

Context = grpc.aio.ServicerContext[Any, Any]

ERROR_KEY = "vitrail-error-bin"
# From a gateway, which counts its requests itself and puts refused images back among the others.
GATEWAY_KEY = "vitrail-gateway"
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class Deps:
    """What the services stand on."""

    backend: Backend
    settings: Settings
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, since when, and their gRPC deadline; in `time.monotonic` seconds."""

    is_gateway: bool
    started: float
    grpc_deadline: float

    def deadline(self, settings: Settings, timeout_ms: float) -> float:
        """The earlier of what the request (0 for no word) and its gRPC deadline allow, or else
        the settings, in `time.monotonic` seconds.

        Raises:
            InvalidInputError: a timeout that is no positive number.
        """
        if not 0 <= timeout_ms < math.inf:
            raise InvalidInputError("timeout_ms must be a positive number", field="timeout_ms")
        if timeout_ms == 0 and self.grpc_deadline == math.inf:
            timeout_ms = settings.default_timeout_ms
        asked = self.started + timeout_ms / 1e3 if timeout_ms else math.inf
        return min(asked, self.grpc_deadline)


@asynccontextmanager
async def answering(
    deps: Deps,
    context: Context,
    method: str,
    *,
    admin: bool = False,
    changes_heads: bool = False,
) -> AsyncIterator[Caller]:
    """Check the caller, then turn what goes wrong in the block into the call's status.

    Calls of a gateway, which logs its requests itself, are logged for debugging only.
    """
    started = time.monotonic()
    metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
    given = metadata.get("x-request-id", "")
    request_id.set(given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex)
    status = "CANCELLED"
    try:
        check = check_admin_key if admin else check_head_key if changes_heads else check_key
        check(deps.settings, metadata.get("x-api-key"), metadata.get("authorization"))
        remaining_s = context.time_remaining()
        grpc_deadline = math.inf if remaining_s is None else started + remaining_s
        yield Caller(GATEWAY_KEY in metadata, started, grpc_deadline)
        status = "OK"
    except ServiceError as error:
        status = error.grpc
        await _abort(context, error)
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception:
        status = "INTERNAL"
        logger.exception("unhandled error")
        detail = "an internal error; the log has it under this request_id"
        await _abort(context, InternalError(detail))
    finally:
        logger.log(
            logging.DEBUG if GATEWAY_KEY in metadata else logging.INFO,
            "gRPC %s",
            method,
            extra={"status": status, "duration_s": round(time.monotonic() - started, 4)},
        )


def check_count(settings: Settings, count: int) -> None:
    """Refuse more inputs than one request may have."""
    if count > settings.max_images:
        raise PayloadTooLargeError(
            f"{count} images in one request; the limit is {settings.max_images}"
        )


async def _abort(context: Context, error: ServiceError) -> None:
    context.set_trailing_metadata(
        (("x-request-id", request_id.get()), (ERROR_KEY, to_error(error).SerializeToString()))
    )
    await context.abort(grpc.StatusCode[error.grpc], error.detail)
