"""The errors of every route in the OpenAPI document, with RFC 9457's schema."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from service.errors import BY_SLUG

SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "RFC 9457",
    "type": "object",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:vitrail:problem:invalid-input"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"field": {"type": "string"}, "detail": {"type": "string"}},
            },
        },
    },
}

OPEN_TAGS = ("system",)
OPEN_PATHS = ("/v2", "/infinity/health", "/immich/ping")
# Routes that run models, by their tag or the end of their path.
RUNNING_TAGS = ("tasks", "OpenAI", "dialects", "collections")
MAKING_TAGS = ("heads", "collections")

KEY = (401, 403, 429)
BODY = (400, 408, 413, 415, 422)
RUN = (404, 429, 503, 504)


def document_errors(app: FastAPI) -> None:
    """Make `app.openapi()` describe the errors of every operation."""
    describe: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = describe()
            document.setdefault("components", {}).setdefault("schemas", {})["Problem"] = SCHEMA
            for path, methods in document["paths"].items():
                for method, operation in methods.items():
                    _add(operation["responses"], statuses(path, method, operation))
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's way to extend it


def statuses(path: str, method: str, operation: dict[str, Any]) -> set[int]:
    """The statuses of the errors that an operation can answer with."""
    tag = operation["tags"][0]
    found = {500}
    if tag not in OPEN_TAGS and "/health/" not in path and path not in OPEN_PATHS:
        found |= {*KEY, 503}
    if "{" in path:
        found |= {404, 422}
    if method in ("post", "put") and ("requestBody" in operation or tag in RUNNING_TAGS):
        found |= set(BODY)
    if method != "get" and (tag in RUNNING_TAGS or path.endswith("/infer")):
        found |= set(RUN)
    if method != "get" and tag in MAKING_TAGS:
        found |= {404, 409}
    if path in ("/healthz", "/readyz") or path.endswith(("/live", "/ready")):
        found.add(503)
    if path in ("/metrics", "/debug/queues"):
        found |= {*KEY}
    return found


def _add(responses: dict[str, Any], found: set[int]) -> None:
    """Add the statuses to an operation's responses; what is described already stays."""
    titles: dict[int, list[str]] = {}
    for error in BY_SLUG.values():
        titles.setdefault(error.status, []).append(error.title)
    for status in sorted(found):
        response = responses.setdefault(str(status), {"description": ", ".join(titles[status])})
        media = {"schema": {"$ref": "#/components/schemas/Problem"}}
        response.setdefault("content", {})["application/problem+json"] = media
        if status in (429, 503):
            header = {"description": "Seconds to wait.", "schema": {"type": "integer"}}
            response["headers"] = {"Retry-After": header}
