"""Requests of a stream: several at a time, answered in their order, each once there is room."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from service.errors import QueueFullError, QuotaExceededError
from service.rpc.context import Caller, Deps
from service.types import InferRequest, InferResult

# Requests of a stream that are answered at a time. Its next message is not read before.
IN_FLIGHT = 32
# A request that waits for room tries again at least this often.
MAX_WAIT_S = 1.0

R = TypeVar("R")
A = TypeVar("A")


async def in_order(
    requests: AsyncIterator[R], answer: Callable[[R], Coroutine[Any, Any, A]]
) -> AsyncGenerator[A, None]:
    """The answers to a stream's requests in their order, up to IN_FLIGHT of them at a time.

    Args:
        answer: answers a request. What it raises ends the stream.
    """
    answers: asyncio.Queue[asyncio.Task[A] | None] = asyncio.Queue(IN_FLIGHT)
    running: set[asyncio.Task[object]] = set()

    async def read() -> None:
        try:
            async for request in requests:
                task = asyncio.create_task(answer(request))
                running.add(task)
                task.add_done_callback(running.discard)
                await answers.put(task)
        except Exception:
            await answers.put(None)
            raise
        await answers.put(None)  # not when cancelled: nothing empties the queue then

    running.add(reader := asyncio.create_task(read()))
    try:
        while (task := await answers.get()) is not None:
            yield await task
        await reader
    finally:
        for unfinished in running:
            unfinished.cancel()


async def infer(deps: Deps, caller: Caller, request: InferRequest) -> InferResult:
    """Count a request's images and run it. One of a stream waits while a quota is used up or the
    queue is full, as long as its deadline allows.

    Raises:
        ServiceError: as `Backend.infer`, or a quota is used up.
    """
    key, images = caller.key, len(request.inputs)
    if not caller.in_stream:
        deps.keys.count_images(key, images)
        return await deps.backend.infer(request)
    counts = [partial(deps.keys.count_request, key), partial(deps.keys.count_images, key, images)]
    while True:
        try:
            while counts:
                counts[0]()
                del counts[0]
            result = await deps.backend.infer(request)
            full = [each.error for each in result.images if isinstance(each.error, QueueFullError)]
            if not full or len(full) < len(result.images):
                return result
            raise full[0]
        except (QueueFullError, QuotaExceededError) as error:
            wait_s = min(error.retry_after_s or MAX_WAIT_S, MAX_WAIT_S)
            if time.monotonic() + wait_s >= request.deadline:
                raise
            await asyncio.sleep(wait_s)
