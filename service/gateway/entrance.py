"""Refuses requests by their headers, before anything else is done for them.

A server that is offered ten times what it can do refuses nine requests in ten. So a refusal must
cost little: it needs neither the framework's routing nor the body.
"""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import QueueFullError, ServiceError
from service.gateway import dispatch
from service.gateway.auth import authorize
from service.gateway.problems import problem_response
from service.key_file import Scope as KeyScope

NDJSON = "application/x-ndjson"

_MARK = "vitrail_refused_early"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class _Mark:
    """How an endpoint's requests are checked.

    Args:
        task: the name under which refused requests are counted.
        scope: what the caller's key must permit.
        in_path: whether the path names the model.
        media: how the content types begin whose bodies ask a model.
        patient: whether bodies that may hold several images wait for their places.
    """

    task: str
    scope: KeyScope
    in_path: bool
    media: tuple[str, ...]
    patient: bool


def refused_early(
    task: str,
    *,
    scope: KeyScope = "infer",
    in_path: bool = False,
    media: tuple[str, ...] = ("",),
    patient: bool = False,
) -> Callable[[F], F]:
    """Mark an endpoint that asks a model, so that `Entrance` checks its requests. See `_Mark`."""

    def mark(endpoint: F) -> F:
        setattr(endpoint, _MARK, _Mark(task, scope, in_path, media, patient))
        return endpoint

    return mark


class Entrance:
    """Checks the key of each request that asks a model, and whether it can be admitted. What is
    streamed as NDJSON, or added to a collection together, waits for its place instead: it is
    refused only if its time would be over by then."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._marks: dict[str, _Mark] = {}  # by path
        self._patterns: list[tuple[re.Pattern[str], _Mark]] = []  # of paths with a name in them
        for route in routes:
            mark = getattr(getattr(route, "endpoint", None), _MARK, None)
            if mark is None:
                continue
            path: str = getattr(route, "path")  # noqa: B009
            if "{" in path:
                self._patterns.append((getattr(route, "path_regex"), mark))  # noqa: B009
            else:
                self._marks[path] = mark

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                self._check(scope)
            except ServiceError as error:
                await problem_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """
        Raises:
            ServiceError: the request is refused.
        """
        path: str = scope["path"]
        if (mark := self._marks.get(path)) is not None:
            _check(Request(scope), mark)
            return
        for pattern, mark in self._patterns:
            if found := pattern.match(path):
                _check(Request(scope), mark, found["name"] if mark.in_path else None)


def _check(request: Request, mark: _Mark, name: str | None = None) -> None:
    """
    Args:
        name: the model in the path.
    """
    authorize(request, mark.scope)
    headers = request.headers
    content_type = headers.get("content-type", "").lower()
    is_image = content_type.startswith("image/")
    if not content_type.startswith(mark.media):
        return
    model = name or (request.query_params.get("model") if mark.scope == "infer" else None)
    # A field of a body can name another model than the query.
    is_certain = model is not None and (name is not None or is_image)
    waits = NDJSON in headers.get("accept", "") or (mark.patient and not is_image)
    try:
        deadline, bulk = dispatch.read_deadline(request), dispatch.read_priority(request)
        try:
            request.app.state.backend.check_headers(
                model if is_certain else None, bulk=bulk, deadline=deadline
            )
        except QueueFullError as error:
            if not waits or time.monotonic() + (error.retry_after_s or 0.0) >= deadline:
                raise
    except ServiceError:
        with dispatch.count_request(request, mark.task) as account:
            account.models = [model or ""]
            raise
