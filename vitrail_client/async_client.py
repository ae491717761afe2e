"""The asynchronous client."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import httpx

from vitrail_client.protocol import (
    DEFAULT_URL,
    RETRY_STATUSES,
    Entry,
    Image,
    Scalar,
    add_request,
    batches,
    check,
    entries,
    query_request,
    task_request,
    wait_before_retry,
)


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

    async def classify(
        self, images: Sequence[Image], *, model: str | None = None, top_k: int | None = None
    ) -> list[Entry]:
        """`{"predictions": [{"index", "label", "score"}]}` for each image, best first."""
        return await self._task("/classify", images, model=model, top_k=top_k)

    async def zero_shot(
        self,
        images: Sequence[Image],
        labels: Sequence[str] | None = None,
        *,
        model: str | None = None,
        templates: Sequence[str] | None = None,
        multi_label: bool | None = None,
    ) -> list[Entry]:
        """As `classify`, with labels of one's own."""
        return await self._task(
            "/zero-shot",
            images,
            labels=labels,
            model=model,
            templates=templates,
            multi_label=multi_label,
        )

    async def embed(
        self,
        images: Sequence[Image],
        *,
        model: str | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        truncate: bool | None = None,
    ) -> list[Entry]:
        """`{"embedding": [...]}` for each image. `dimensions` of a model that was not trained for
        it need `truncate`."""
        return await self._task(
            "/embed",
            images,
            model=model,
            pooling=pooling,
            normalize=normalize,
            dimensions=dimensions,
            truncate=truncate,
        )

    async def embed_texts(
        self, texts: Sequence[str], *, model: str | None = None, dimensions: int | None = None
    ) -> list[Entry]:
        """`{"embedding": [...]}` for each text, of a model that embeds texts, too."""
        options = {"model": model, "dimensions": dimensions}
        given = {name: value for name, value in options.items() if value is not None}
        return await self._all("/embed", texts, lambda batch: {"json": {"texts": batch, **given}})

    async def segment(
        self,
        images: Sequence[Image],
        *,
        model: str | None = None,
        output: str | None = None,
        threshold: float | None = None,
        min_area: int | None = None,
        labels: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
    ) -> list[Entry]:
        """`{"width", "height", "classes", "mask"}` for each image; `output` is the mask's form."""
        return await self._task(
            "/segment",
            images,
            model=model,
            output=output,
            threshold=threshold,
            min_area=min_area,
            labels=labels,
            templates=templates,
        )

    async def predict(self, images: Sequence[Image], models: Sequence[str]) -> list[Entry]:
        """`{"outputs": {model: ...}}` for each image: what each model's own task returns."""
        return await self._task("/predict", images, models=models)

    async def models(self) -> list[dict[str, Any]]:
        """Every model of the catalog, with its state."""
        answer = await self._send("GET", "/models")
        found: list[dict[str, Any]] = answer["models"]
        return found

    async def create_collection(self, name: str, *, model: str | None = None) -> dict[str, Any]:
        """Create a collection, unless it exists with that model."""
        body = {} if model is None else {"model": model}
        found: dict[str, Any] = await self._send("PUT", f"/collections/{name}", json=body)
        return found

    async def collections(self) -> list[dict[str, Any]]:
        """Every collection, with its model and number of images."""
        answer = await self._send("GET", "/collections")
        found: list[dict[str, Any]] = answer["collections"]
        return found

    async def delete_collection(self, name: str) -> None:
        """Delete a collection with all its images."""
        await self._send("DELETE", f"/collections/{name}")

    async def add_images(
        self,
        collection: str,
        images: Sequence[Image],
        *,
        ids: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Scalar]] | None = None,
    ) -> list[Entry]:
        """Add images to a collection: `{"id"}` or `{"error"}` for each."""
        items = entries(images, ids, metadata)
        return await self._all(f"/collections/{collection}/images", items, add_request)

    async def search(
        self,
        collection: str,
        *,
        image: Image | None = None,
        text: str | None = None,
        vector: Sequence[float] | None = None,
        k: int = 10,
        where: Mapping[str, Scalar] | None = None,
    ) -> list[dict[str, Any]]:
        """The images nearest to an image, a text or a vector, best first:
        `{"id", "score", "metadata"}` each. `where` holds values that their metadata must have."""
        body = query_request(image, text, vector, k, where)
        answer = await self._send("POST", f"/collections/{collection}/search", **body)
        hits: list[dict[str, Any]] = answer["hits"]
        return hits

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _task(self, path: str, images: Sequence[Image], **parameters: Any) -> list[Entry]:
        return await self._all(path, images, lambda batch: task_request(batch, parameters))

    async def _all(
        self, path: str, items: Sequence[Any], make: Callable[[Sequence[Any]], dict[str, Any]]
    ) -> list[Entry]:
        """The entries of all items, which are sent in batches."""
        room = asyncio.Semaphore(self._concurrency)
        done = 0

        async def send(batch: Sequence[Any]) -> list[Entry]:
            nonlocal done
            async with room:
                body = await asyncio.to_thread(make, batch)  # it reads files
                found: list[Entry] = (await self._send("POST", path, **body))["results"]
            done += len(batch)
            if self._progress is not None:
                self._progress(done, len(items))
            return found

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(send(each)) for each in batches(items, self._batch_size)]
        return [entry for task in tasks for entry in task.result()]

    async def _send(self, method: str, path: str, **request: Any) -> Any:
        for attempt in range(self._max_tries):
            last = attempt == self._max_tries - 1
            response = None
            try:
                response = await self._http.request(method, path, **request)
                if response.status_code not in RETRY_STATUSES or last:
                    break
            except httpx.ConnectError:
                if last:
                    raise
            await asyncio.sleep(wait_before_retry(attempt, response))
        assert response is not None
        return check(response).json() if response.content else None
