"""The asynchronous client."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from vitrail_client import calls
from vitrail_client.call import Call, describe_method
from vitrail_client.protocol import DEFAULT_URL, RETRY_STATUSES, parse, wait_before_retry

P = ParamSpec("P")
T = TypeVar("T")


def _method(
    make: Callable[P, Call[T]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    """The method that sends what `make` returns."""

    async def method(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await client._run(make(*args, **kwargs))

    describe_method(method, make)
    return method


class AsyncClient:
    """As `Client`, for asynchronous programs."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        timeout_s: float = 60,
        max_tries: int = 5,
        batch_size: int = 16,
        concurrency: int = 4,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout_s)
        self._max_tries = max_tries
        self._batch_size = batch_size
        self._concurrency = concurrency
        self._progress = progress

    classify = _method(calls.classify)
    zero_shot = _method(calls.zero_shot)
    embed = _method(calls.embed)
    embed_texts = _method(calls.embed_texts)
    segment = _method(calls.segment)
    predict = _method(calls.predict)
    task = _method(calls.task)
    models = _method(calls.models)
    create_collection = _method(calls.create_collection)
    collections = _method(calls.collections)
    collection = _method(calls.collection)
    delete_collection = _method(calls.delete_collection)
    images = _method(calls.images)
    add_images = _method(calls.add_images)
    add_folder = _method(calls.add_folder)
    delete_image = _method(calls.delete_image)
    delete_images = _method(calls.delete_images)
    search = _method(calls.search)

    async def request(self, method: str, path: str, **arguments: Any) -> Any:
        """As `Client.request`."""
        return parse(await self._send(method, path, **arguments))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _run(self, call: Call[T]) -> T:
        room = asyncio.Semaphore(self._concurrency)
        done = 0

        async def answer(batch: Sequence[Any]) -> Any:
            nonlocal done
            async with room:
                body = await asyncio.to_thread(call.body, batch)  # it reads files
                response = await self._send(call.method, call.path, **body)
            found = call.answer(batch, response)
            done += len(batch)
            if self._progress is not None and call.items is not None:
                self._progress(done, len(call.items))
            return found

        batches = call.batches(self._batch_size)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(answer(batch)) for batch in batches]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return call.read([task.result() for task in tasks])

    async def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """The response, of whatever status; sent again while the server is busy."""
        for attempt in range(self._max_tries - 1):
            response = None
            try:
                response = await self._http.request(method, path, **arguments)
                if response.status_code not in RETRY_STATUSES:
                    return response
            except httpx.ConnectError:
                pass
            await asyncio.sleep(wait_before_retry(attempt, response))
        return await self._http.request(method, path, **arguments)
