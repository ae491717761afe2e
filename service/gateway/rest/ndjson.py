"""NDJSON: an answer a line for each input, in order, each as soon as it and all before are done."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from models.inputs.types import Input
from models.tasks.table import get_task
from service.accounting import Account, counted
from service.backend import Backend
from service.errors import QueueFullError, ServiceError
from service.gateway.dispatch import deadline_of, is_bulk
from service.gateway.problems import describe
from service.gateway.rest.body import read_images
from service.parameters import EmbedParameters
from service.types import ImageResult, InferRequest, InferResult

NDJSON = "application/x-ndjson"
IN_FLIGHT = 32


async def stream_embeddings(request: Request) -> StreamingResponse:
    """One request of the backend for each input; while the queue is full, they wait.

    Raises:
        ServiceError: what is wrong with the request as a whole, before the first line.
    """
    state = request.app.state
    with ExitStack() as stack:
        started = request.scope["state"]["started"]
        seen = stack.enter_context(counted(state.metrics, state.backend.knows, "embed", started))
        received = await read_images(request, EmbedParameters)
        parameters = received.parameters
        calls = parameters.calls()
        wanted = InferRequest(
            inputs=(), calls=calls, deadline=deadline_of(request), bulk=is_bulk(request)
        )
        seen.models, seen.deadline = [calls[0].model or ""], wanted.deadline
        inputs = received.inputs
        room = asyncio.Semaphore(IN_FLIGHT)
        tasks = [asyncio.create_task(_answer(state.backend, item, wanted, room)) for item in inputs]
        stack.callback(lambda: [task.cancel() for task in tasks])
        await asyncio.wait(tasks[:1])
        _raise_if_refused(tasks[0], inputs[0])
        lines = _lines(tasks, seen, stack.pop_all(), parameters.encoding)
        return StreamingResponse(lines, media_type=NDJSON)


def _raise_if_refused(first: "asyncio.Task[InferResult]", given: Input | ServiceError) -> None:
    """The backend refuses a request, and so all of them, before it looks at the input."""
    error = first.exception()
    if error is not None and error is not given:
        raise error


async def _lines(
    tasks: Sequence["asyncio.Task[InferResult]"], seen: Account, stack: ExitStack, encoding: str
) -> AsyncIterator[bytes]:
    images: list[ImageResult] = []
    with stack:
        for position, task in enumerate(tasks):
            try:
                result = await task
                images += result.images
                seen.answered(InferResult(result.models, images))
                yield _line(position, result, encoding)
            except ServiceError as error:
                yield _encoded({"index": position, "error": describe(error)})


async def _answer(
    backend: Backend, item: Input | ServiceError, wanted: InferRequest, room: asyncio.Semaphore
) -> InferResult:
    if isinstance(item, ServiceError):
        raise item
    async with room:
        while True:
            try:
                return await backend.infer(replace(wanted, inputs=[item]))
            except QueueFullError as error:
                now = time.monotonic()
                wait_s = min(error.retry_after_s or 1, 1.0)
                if now + wait_s >= wanted.deadline:
                    raise
                await asyncio.sleep(wait_s)


def _line(position: int, result: InferResult, encoding: str) -> bytes:
    used, image = result.models[0], result.images[0]
    line: dict[str, Any] = {"index": position, "model": used.name}
    output = image.error or image.outputs[0]
    if isinstance(output, ServiceError):
        return _encoded({**line, "error": describe(output)})
    line |= {"model_digest": used.model_digest, "preprocess_digest": used.preprocess_digest}
    return _encoded({**line, **get_task(used.task).render(output, encoding=encoding)})


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"
