"""Refuses requests by their headers, before anything else is done for them.

A server that is offered ten times what it can do refuses nine requests in ten. So a refusal must
cost little: it needs neither the framework's routing nor the body.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ServiceError
from service.gateway import dispatch
from service.gateway.auth import authorize
from service.gateway.problems import problem_response

NDJSON = "application/x-ndjson"

_TASK = "vitrail_task"

F = TypeVar("F", bound=Callable[..., Any])


def refused_early(task: str) -> Callable[[F], F]:
    """Mark an endpoint that asks a model, so that `Entrance` checks its requests.

    Args:
        task: the name under which refused requests are counted.
    """

    def mark(endpoint: F) -> F:
        setattr(endpoint, _TASK, task)
        return endpoint

    return mark


class Entrance:
    """Checks the key of each request that asks a model, and whether it can be admitted. What is
    streamed as NDJSON waits for its place instead."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._tasks: dict[str, str] = {}  # by path
        self._patterns: list[tuple[re.Pattern[str], str]] = []  # of paths that name the model
        for route in routes:
            task = getattr(getattr(route, "endpoint", None), _TASK, None)
            if task is None:
                continue
            path: str = getattr(route, "path")  # noqa: B009
            if "{" in path:
                self._patterns.append((getattr(route, "path_regex"), task))  # noqa: B009
            else:
                self._tasks[path] = task

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
        if (task := self._tasks.get(path)) is not None:
            _check(Request(scope), task)
            return
        for pattern, task in self._patterns:
            if found := pattern.match(path):
                _check(Request(scope), task, found["name"])


def _check(request: Request, task: str, name: str | None = None) -> None:
    """
    Args:
        name: the model in the path.
    """
    authorize(request, "infer")
    headers = request.headers
    model = name or request.query_params.get("model")
    # A field of a body can name another model than the query.
    is_certain = name is not None or headers.get("content-type", "").startswith("image/")
    try:
        deadline, bulk = dispatch.read_deadline(request), dispatch.read_priority(request)
        if NDJSON not in headers.get("accept", ""):
            request.app.state.backend.check_headers(
                model if is_certain else None, bulk=bulk, deadline=deadline
            )
    except ServiceError:
        with dispatch.count_request(request, task) as account:
            account.models = [model or ""]
            raise
