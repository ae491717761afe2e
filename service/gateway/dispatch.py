"""Asking the backend on behalf of a request: its deadline, its priority, and its leaving."""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from models.inputs.types import Input
from service.backend import Backend
from service.errors import InvalidInputError
from service.settings import Settings
from service.types import Call, InferRequest, InferResult

T = TypeVar("T")


async def ask(
    request: Request,
    inputs: Sequence[Input],
    calls: Sequence[Call],
    *,
    timeout_ms: float | None = None,
) -> InferResult:
    """The backend's answer; dropped as soon as the client leaves.

    Args:
        timeout_ms: from the request's own body; without it `X-Timeout-Ms` or the setting counts.

    Raises:
        ServiceError: the request as a whole was refused.
        ClientDisconnect: the client left.
    """
    backend: Backend = request.app.state.backend
    wanted = InferRequest(
        inputs=inputs,
        calls=calls,
        deadline=deadline_of(request, timeout_ms),
        bulk=is_bulk(request),
    )
    settings: Settings = request.app.state.settings
    return await _while_connected(request, _in_chunks(backend, wanted, settings.max_images))


async def _in_chunks(backend: Backend, wanted: InferRequest, size: int) -> InferResult:
    """Many texts a few at a time, as many as a request may hold images: no queue takes more."""
    results = []
    for start in range(0, max(1, len(wanted.inputs)), size):
        inputs = wanted.inputs[start : start + size]
        results.append(await backend.infer(replace(wanted, inputs=inputs)))
    return InferResult(results[0].models, [image for r in results for image in r.images])


def deadline_of(request: Request, timeout_ms: float | None = None) -> float:
    """In `time.monotonic` seconds: by `timeout_ms`, or else `X-Timeout-Ms` or the setting."""
    settings: Settings = request.app.state.settings
    header = request.headers.get("x-timeout-ms")
    try:
        if timeout_ms is None:
            timeout_ms = float(header) if header is not None else settings.default_timeout_ms
    except ValueError:
        timeout_ms = float("nan")
    if not 0 < timeout_ms < float("inf"):
        given = (
            f"X-Timeout-Ms is {header!r}" if header is not None else f"timeout is {timeout_ms} ms"
        )
        raise InvalidInputError(f"{given}; it must be a positive number")
    started: float = request.scope["state"]["started"]
    return started + timeout_ms / 1e3


def is_bulk(request: Request) -> bool:
    """Whether `X-Priority` is bulk."""
    priority = request.headers.get("x-priority", "interactive")
    if priority not in ("interactive", "bulk"):
        raise InvalidInputError(f"X-Priority is {priority!r}; it can be interactive or bulk")
    return priority == "bulk"


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it as soon as the client leaves."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
