"""Around every request: its id, the access line, and the last resort for our own faults."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.gateway.problems import internal_problem
from service.logs import request_id

logger = logging.getLogger("vitrail.access")

_SAFE_ID = re.compile(r"[\x21-\x7e]{1,128}")
_QUIET = ("/healthz", "/readyz", "/metrics")


class RequestContext:
    """Pure ASGI, so that the route keeps the raw `receive` and sees its client leave."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        current = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(current)
        started = time.monotonic()
        scope.setdefault("state", {})["started"] = started
        status = 499  # what the log says of a client that left before its answer began

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = current
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except Exception:
            logger.exception("unhandled error")
            if status == 499:
                await internal_problem()(scope, receive, send_with_id)
        finally:
            level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
            logger.log(
                level,
                "%s %s",
                scope["method"],
                scope["path"],
                extra={"status": status, "duration_s": round(time.monotonic() - started, 4)},
            )
