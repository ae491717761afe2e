"""What every gRPC call has in common: request id, API key, deadline, errors and access log."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc

from service import tracing
from service.accounting import counted
from service.audit import audit, key_field
from service.backend import Backend
from service.clients import client, identify, peer_address
from service.errors import InternalError, InvalidInputError, PermissionDeniedError, ServiceError
from service.key_file import Scope
from service.keys import WORKER_TOKEN, ApiKey, Keys
from service.limits import MAX_TIMEOUT_MS, Budget, Share
from service.logs import access_level, choose_request_id, request_id
from service.metrics import Metrics
from service.open_inference.shared_memory import SharedMemory
from service.rpc.reading import begin
from service.rpc.wire import to_trailer
from service.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger("vitrail.access")

Context = grpc.aio.ServicerContext[Any, Any]

ERROR_KEY = "vitrail-error-bin"
# The metadata key of a gateway's calls. A gateway counts its requests itself, and it needs the
# results of the other images even if one is refused.
GATEWAY_KEY = "vitrail-gateway"
# The metadata key of the client on whose behalf a gateway calls.
CLIENT_KEY = "vitrail-client"
# Methods that take as long as their clients send.
STREAMS = ("EmbedStream", "ModelStreamInfer")
# Statuses that are the server's fault.
_SERVER_FAULTS = ("INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN")


@dataclass(frozen=True, slots=True)
class Deps:
    """The objects that all services share."""

    backend: Backend
    settings: Settings
    metrics: Metrics
    keys: Keys
    budget: Budget
    memory: SharedMemory


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a call. Times are in `time.monotonic` seconds."""

    is_gateway: bool
    started: float
    # Infinite if the call has none.
    grpc_deadline: float
    # The caller's key as it is now: a stream may outlast it.
    find_key: Callable[[], ApiKey | None]
    key: ApiKey | None = None
    # What the request holds of the budget, once its message has been received.
    share: Share | None = None
    # Whether it is one request of a stream, which waits while the queue is full.
    in_stream: bool = False

    def next_request(self) -> "Caller":
        """The sender of the stream's next request, which starts now.

        Raises:
            PermissionDeniedError: the key was revoked or has expired since.
        """
        return replace(self, key=self.find_key(), started=time.monotonic(), in_stream=True)

    def deadline(self, settings: Settings, timeout_ms: float) -> float:
        """The earlier one of the request's deadline and the gRPC deadline.

        Args:
            timeout_ms: the request's timeout; 0 if it has none. Without a gRPC deadline, the
                settings' default is used instead.

        Returns:
            The deadline in `time.monotonic` seconds.

        Raises:
            InvalidInputError: the timeout is negative, infinite or not a number.
        """
        if not 0 <= timeout_ms < math.inf:
            raise InvalidInputError("timeout_ms must be a positive number", field="timeout_ms")
        if timeout_ms == 0 and self.grpc_deadline == math.inf:
            timeout_ms = settings.default_timeout_ms
        timeout_s = min(timeout_ms, MAX_TIMEOUT_MS) / 1e3
        deadline = self.started + timeout_s if timeout_ms else math.inf
        return min(deadline, self.grpc_deadline)


@asynccontextmanager
async def handle_call(
    deps: Deps,
    context: Context,
    method: str,
    *,
    scope: Scope = "infer",
    task: str | None = None,
) -> AsyncIterator[Caller]:
    """Check the API key and receive the message, which is empty before. Abort the call with the
    status of any error in the block.

    A gateway logs its requests itself, so its calls are logged at level DEBUG.

    Args:
        method: the name in the access log.
        scope: what the caller's key must permit. Calls of `heads` and `admin` are audited.
        task: of a call that asks a model, the name under which it is counted. It is refused before
            its message is received if it would be refused whatever that holds.
    """
    started = time.monotonic()
    metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
    sent_id = metadata.get("x-request-id", "")
    request_id.set(choose_request_id(sent_id))
    span = _start_span(method, metadata)
    token = metadata.get(WORKER_TOKEN)
    is_gateway = GATEWAY_KEY in metadata and deps.keys.is_gateway(token)
    status, key = "CANCELLED", None
    try:
        if scope == "admin" and deps.settings.admin_port and not deps.keys.for_gateways:
            raise PermissionDeniedError("admin calls are on the admin port, over REST")
        sent = (scope, metadata.get("x-api-key"), metadata.get("authorization"), token)
        key = deps.keys.authorize(*sent)
        client.set(_client(key, metadata if is_gateway else {}, context.peer()))
        remaining_s = context.time_remaining()
        grpc_deadline = math.inf if remaining_s is None else started + remaining_s
        find_key = partial(deps.keys.check, *sent)
        caller = Caller(is_gateway, started, grpc_deadline, find_key, key)
        if task is not None:
            _check_admission(deps, caller, task)
        # by address, as over HTTP, where the key is not known yet
        holder = client.get() if is_gateway else identify(None, peer_address(context.peer()))
        with deps.budget.request("grpc", holder) as share:
            await begin.get()(share)
            yield replace(caller, share=share)
        status = "OK"
    except ServiceError as error:
        status = error.grpc
        await _abort(context, error.kept())
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception:
        status = "INTERNAL"
        logger.exception("unhandled error")
        detail = "an internal error; the log has it under this request_id"
        await _abort(context, InternalError(detail))
    finally:
        duration_s = round(time.monotonic() - started, 4)
        level = logging.DEBUG if is_gateway else logging.INFO
        if method not in STREAMS:
            level = access_level(level, duration_s, deps.settings.slow_request_s)
        logger.log(
            level,
            "gRPC %s",
            method,
            extra={"status": status, "duration_s": duration_s, **key_field(key)},
        )
        failed = status in _SERVER_FAULTS
        tracing.end_request(span, failed=failed, attributes={"rpc.response.status_code": status})
        if scope in ("heads", "admin"):
            audit(f"gRPC {method}", status=status, client=context.peer(), key=key)


def _start_span(method: str, metadata: Mapping[str, str]) -> "Span | None":
    """The call's span. The probes of gateways, which come every second, have none."""
    if not tracing.is_on() or (method == "ListModels" and GATEWAY_KEY in metadata):
        return None
    attributes = {
        "rpc.system.name": "grpc",
        "rpc.method": method,
        "vitrail.request_id": request_id.get(),
    }
    return tracing.start_request(f"gRPC {method}", metadata, attributes)


def _check_admission(deps: Deps, caller: Caller, task: str) -> None:
    """Check whether any image could be admitted. The message may have a timeout and a priority of
    its own, but no later deadline than the call's, and no priority over interactive calls."""
    try:
        deps.backend.check_headers(None, bulk=False, deadline=caller.grpc_deadline)
    except ServiceError:
        if not caller.is_gateway:
            with counted(deps.metrics, deps.backend.knows, task, caller.started):
                raise
        raise


def _client(key: ApiKey | None, metadata: Mapping[str, str], peer: str) -> str:
    """The client of a call.

    Args:
        metadata: that of a gateway's call, which names the gateway's own client.
    """
    return metadata.get(CLIENT_KEY) or identify(key, peer_address(peer))


async def _abort(context: Context, error: ServiceError) -> None:
    text, told = to_trailer(error)
    context.set_trailing_metadata(
        (("x-request-id", request_id.get()), (ERROR_KEY, told.SerializeToString()))
    )
    await context.abort(grpc.StatusCode[error.grpc], text)
