"""Middleware for every request: its id, the access log line, and unhandled errors."""

import logging
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import tracing
from service.audit import audit, key_field
from service.clients import identify
from service.errors import PayloadTooLargeError, ServiceError
from service.gateway.problems import internal_problem, problem_response
from service.gateway.security_headers import add_security_headers
from service.limits import Budget
from service.logs import access_level, choose_request_id, request_id

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger("vitrail.access")

MAX_QUERY_FIELDS = 2000
_QUIET = ("/healthz", "/readyz", "/metrics")


class RequestContext:
    """Sets the request's id and start time, and logs the request.

    Plain ASGI, because starlette's `BaseHTTPMiddleware` hides the client's disconnect from routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        current = choose_request_id(headers.get("x-request-id", ""))
        request_id.set(current)
        span = None if scope["path"] in _QUIET else _start_span(scope, headers, current)
        # with the request's first byte, where the server tells
        started: float = scope.setdefault("state", {}).setdefault("started", time.monotonic())
        status = 499  # logged if the client leaves before the response starts

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if status == 200 and "due" in scope["state"]:
                    scope["app"].state.lateness.answered(scope["state"]["due"])
                sent = MutableHeaders(scope=message)
                sent["X-Request-ID"] = current
                add_security_headers(sent, encrypted=scope["scheme"] == "https")
            await send(message)

        try:
            with ExitStack() as stack:
                await self._admitted(scope, stack)(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("unhandled error")
            if status == 499:
                await internal_problem()(scope, receive, send_with_id)
        finally:
            level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
            action, key = f"{scope['method']} {scope['path']}", scope["state"].get("key")
            duration_s = round(time.monotonic() - started, 4)
            level = access_level(level, duration_s, scope["app"].state.settings.slow_request_s)
            logger.log(
                level, action, extra={"status": status, "duration_s": duration_s, **key_field(key)}
            )
            _end_span(span, scope, status)
            if scope["state"].get("audited"):
                client = ":".join(map(str, scope["client"] or ()))
                audit(action, status=status, client=client, key=key)

    def _admitted(self, scope: Scope, stack: ExitStack) -> ASGIApp:
        """The application, or a refusal if too many requests are in flight, or if the query has too
        many fields. Health is reported whatever is in flight."""
        budget: Budget = scope["app"].state.budget
        try:
            if scope["query_string"].count(b"&") >= MAX_QUERY_FIELDS:  # before it is taken apart
                raise PayloadTooLargeError(f"the query has more than {MAX_QUERY_FIELDS} fields")
            if scope["path"] in _QUIET or scope["path"].startswith("/v2/health/"):
                return self.app
            # by address: keys are not looked up yet
            client = identify(None, scope["client"][0] if scope["client"] else "")
            scope["state"]["share"] = stack.enter_context(budget.request("http", client))
        except ServiceError as error:
            return problem_response(error, scope["path"])
        return self.app


def _start_span(scope: Scope, headers: Headers, current: str) -> "Span | None":
    if not tracing.is_on():
        return None
    attributes = {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "url.scheme": scope["scheme"],
        "vitrail.request_id": current,
    }
    return tracing.start_request(scope["method"], headers, attributes)


def _end_span(span: "Span | None", scope: Scope, status: int) -> None:
    if span is None:
        return
    attributes: dict[str, str | int] = {"http.response.status_code": status}
    name = scope["method"]
    if route := getattr(scope.get("route"), "path", ""):  # refused before it was routed
        attributes["http.route"] = route
        name = f"{name} {route}"
    if failed := status >= 500:
        attributes["error.type"] = str(status)
    tracing.end_request(span, name=name, failed=failed, attributes=attributes)
