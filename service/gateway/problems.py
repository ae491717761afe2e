"""Errors as RFC 9457 `application/problem+json`."""

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service.errors import InternalError, ServiceError
from service.logs import request_id


def describe(error: ServiceError) -> dict[str, Any]:
    """The members that a whole answer's error and one entry's error share."""
    return {
        "type": f"urn:vitrail:problem:{error.slug}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }


def problem_response(error: ServiceError, path: str = "") -> JSONResponse:
    """The error as the whole answer to a request of `path`."""
    body = describe(error) | {"request_id": request_id.get()}
    if path.startswith("/v2/"):  # where clients of the Open Inference Protocol look for it
        body["error"] = error.detail
    if path.startswith("/v1/"):  # and OpenAI's
        body["error"] = {"message": error.detail, "type": error.slug, "param": None, "code": None}
    if error.fields:
        body["errors"] = [item._asdict() for item in error.fields]
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):  # the rest of the body will not be read
        headers["Connection"] = "close"
    return JSONResponse(body, error.status, headers=headers, media_type="application/problem+json")


def internal_problem() -> JSONResponse:
    """What a client learns of a fault of ours: nothing but the request's id."""
    return problem_response(
        InternalError("an internal error; the log has it under this request_id")
    )


def install_handlers(app: FastAPI) -> None:
    """Answer our errors and the framework's own (no such route, wrong method) as problems."""

    @app.exception_handler(ServiceError)
    async def _service_error(request: Request, error: ServiceError) -> JSONResponse:
        return problem_response(error, request.url.path)

    @app.exception_handler(HTTPException)
    async def _http_exception(request: Request, error: HTTPException) -> JSONResponse:
        body = {
            "type": "about:blank",
            "title": str(error.detail),
            "status": error.status_code,
            "detail": f"{request.method} {request.url.path}: {error.detail}",
            "request_id": request_id.get(),
        }
        return JSONResponse(
            body,
            error.status_code,
            headers=dict(error.headers or {}),
            media_type="application/problem+json",
        )
