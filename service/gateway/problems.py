"""Errors as RFC 9457 `application/problem+json`."""

import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from service.errors import InternalError, ServiceError
from service.logs import request_id


def describe(error: ServiceError) -> dict[str, Any]:
    """The members of an error, of a whole response or of one entry."""
    return {
        "type": f"urn:vitrail:problem:{error.slug}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
    }


def problem_response(error: ServiceError, path: str = "") -> JSONResponse:
    """The error as the response to a request of `path`."""
    body = describe(error) | {"request_id": request_id.get()}
    body |= _members_of_dialect(path, error.detail, error.slug)
    if error.fields:
        body["errors"] = [item._asdict() for item in error.fields]
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):  # the rest of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(body, error.status, headers=headers, media_type="application/problem+json")


def _members_of_dialect(path: str, detail: str, slug: str) -> dict[str, Any]:
    """Where the clients of other servers look for what is wrong."""
    if path.startswith("/v2/"):  # the Open Inference Protocol
        return {"error": detail}
    if path.startswith(("/v1/", "/infinity/")):  # OpenAI
        return {"error": {"message": detail, "type": slug, "param": None, "code": None}}
    if path.startswith("/tei/"):
        return {"error": detail, "error_type": slug}
    return {"message": detail} if path.startswith("/cohere/") else {}


def internal_problem() -> JSONResponse:
    """The response to an unhandled exception. It has the request's id and no details."""
    return problem_response(
        InternalError("an internal error; the log has it under this request_id")
    )


def install_handlers(app: FastAPI) -> None:
    """Turn `ServiceError` and the framework's errors (wrong path or method) into problems."""

    @app.exception_handler(ServiceError)
    async def _service_error(request: Request, error: ServiceError) -> JSONResponse:
        return problem_response(error, request.url.path)

    @app.exception_handler(HTTPException)
    async def _http_exception(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path
        slug = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
        detail = f"{request.method} {path}: {error.detail}"
        if error.status_code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            detail += "; /docs lists all routes"
        body = {
            "type": "about:blank",
            "title": str(error.detail),
            "status": error.status_code,
            "detail": detail,
            "request_id": request_id.get(),
        }
        return JSONResponse(
            body | _members_of_dialect(path, detail, slug),
            error.status_code,
            headers=dict(error.headers or {}),
            media_type="application/problem+json",
        )
