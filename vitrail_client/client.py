"""The synchronous client."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from vitrail_client import calls
from vitrail_client.call import Call, describe_method
from vitrail_client.protocol import DEFAULT_URL, RETRY_STATUSES, parse, wait_before_retry

P = ParamSpec("P")
T = TypeVar("T")


def _method(make: Callable[P, Call[T]]) -> Callable[Concatenate["Client", P], T]:
    """The method that sends what `make` returns."""

    def method(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return client._run(make(*args, **kwargs))

    describe_method(method, make)
    return method


class Client:
    """Sends images in batches, several batches at a time, and waits while the server is busy.

    Lists of results have one entry for each image, in order. An image that failed has
    `{"error": {...}}` in its place; if it was the only one, the method raises VitrailError.

    Args:
        key: the API key, if the server requires one.
        timeout_s: seconds to wait for an answer.
        max_tries: how often a request is sent while the server is busy or cannot be reached.
        batch_size: images in a request; fewer if they are large.
        concurrency: requests at a time.
        progress: called with the number of images that are done, and of all.
    """

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
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s)
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

    def request(self, method: str, path: str, **arguments: Any) -> Any:
        """The JSON of any route's answer, None if it has no body.

        Args:
            arguments: those of httpx: `json`, `content`, `params`, `headers`, ...

        Raises:
            VitrailError: the request failed.
            httpx.HTTPError: the server cannot be reached.
        """
        return parse(self._send(method, path, **arguments))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _run(self, call: Call[T]) -> T:
        batches = call.batches(self._batch_size)
        answers: list[Any] = []
        done = 0
        with ThreadPoolExecutor(self._concurrency) as pool:
            for batch, answer in zip(
                batches, pool.map(partial(self._answer, call), batches), strict=True
            ):
                answers.append(answer)
                done += len(batch)
                if self._progress is not None and call.items is not None:
                    self._progress(done, len(call.items))
        return call.read(answers)

    def _answer(self, call: Call[Any], batch: Sequence[Any]) -> Any:
        return call.answer(batch, self._send(call.method, call.path, **call.body(batch)))

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """The response, of whatever status; sent again while the server is busy."""
        for attempt in range(self._max_tries - 1):
            response = None
            try:
                response = self._http.request(method, path, **arguments)
                if response.status_code not in RETRY_STATUSES:
                    return response
            except httpx.ConnectError:
                pass
            time.sleep(wait_before_retry(attempt, response))
        return self._http.request(method, path, **arguments)
