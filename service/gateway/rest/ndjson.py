"""NDJSON responses: one line for each input, in order, sent as soon as it is ready."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic_core import to_json

from models.tasks.base import Task
from service.accounting import Account
from service.backend import Backend
from service.errors import QueueFullError, ServiceError
from service.gateway import dispatch
from service.gateway.auth import count_images
from service.gateway.entrance import NDJSON
from service.gateway.json_response import made_of
from service.gateway.problems import describe
from service.gateway.rest.body import read_request
from service.gateway.rest.content import share_of
from service.gateway.rest.responses import digests, first_output
from service.parameters import TaskParameters, task_parameters
from service.types import ImageResult, InferRequest, InferResult

IN_FLIGHT = 32

Answers = deque["asyncio.Task[InferResult]"]


async def stream_task(request: Request, task: Task) -> StreamingResponse:
    """Send each input to the backend by itself. While the queue is full, inputs wait.

    Raises:
        ServiceError: the request as a whole was refused; raised before the first line.
    """
    backend: Backend = request.app.state.backend
    with ExitStack() as stack:
        account = stack.enter_context(dispatch.count_request(request, task.name))
        parameters, infer_request = await read_request(request, task_parameters(task.name))
        account.requested(infer_request)
        count_images(request, len(infer_request.inputs))
        room = asyncio.Semaphore(IN_FLIGHT)
        answers: Answers = deque(
            asyncio.create_task(_answer(backend, replace(infer_request, inputs=[item]), room))
            for item in infer_request.inputs
        )
        stack.callback(_cancel, answers)
        # An input's own failure is in its result. An exception concerns the calls, so all inputs.
        await asyncio.wait([answers[0]])
        if (error := answers[0].exception()) is not None:
            raise error
        lines = _lines(request, task, parameters, answers, account, stack.pop_all())
        return StreamingResponse(lines, media_type=NDJSON)


async def _answer(backend: Backend, single: InferRequest, room: asyncio.Semaphore) -> InferResult:
    """The result for a request of one input, sent again while the queue is full."""
    async with room:
        while True:
            try:
                return await dispatch.send(backend, single, 1)
            except QueueFullError as error:
                wait_s = min(error.retry_after_s or 1, 1.0)
                if time.monotonic() + wait_s >= single.deadline:
                    raise
                await asyncio.sleep(wait_s)


def _cancel(answers: Answers) -> None:
    for answer in answers:
        if not answer.cancel() and not answer.cancelled():
            answer.exception()  # retrieves it; asyncio logs exceptions that are never retrieved


async def _lines(
    request: Request,
    task: Task,
    parameters: TaskParameters,
    answers: Answers,
    account: Account,
    stack: ExitStack,
) -> AsyncIterator[bytes]:
    options, share = parameters.render_options(), share_of(request)
    images: list[ImageResult] = []
    with stack:
        for position in range(len(answers)):
            line: dict[str, Any] = {"index": position}
            made_before = share.made_bytes
            try:
                result = await answers.popleft()
                used = result.models[0]
                images += map(_without_arrays, result.images)
                account.answered(InferResult(result.models, images))
                line["model"] = used.name
                output = first_output(result.images[0])
                if isinstance(output, ServiceError):
                    raise output
                line |= digests(task, used)
                line |= await made_of(request, result, partial(task.render, output, **options))
            except ServiceError as error:
                line["error"] = describe(error)
            yield to_json(line) + b"\n"
            share.give_back_made(share.made_bytes - made_before)


def _without_arrays(image: ImageResult) -> ImageResult:
    """What is counted of a result, which must not keep its memory."""
    return replace(
        image,
        outputs=[output if isinstance(output, ServiceError) else {} for output in image.outputs],
    )
