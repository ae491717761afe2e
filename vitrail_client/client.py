"""The synchronous client."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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


class Client:
    """Sends images in batches, several batches at a time, and waits while the server is busy.

    Lists of results have one entry for each image, in order. An image that failed has
    `{"error": {...}}` in its place.

    Args:
        key: the API key, if the server requires one.
        timeout_s: seconds to wait for an answer.
        max_tries: how often a request is sent while the server is busy or cannot be reached.
        batch_size: images in a request.
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

    def classify(
        self, images: Sequence[Image], *, model: str | None = None, top_k: int | None = None
    ) -> list[Entry]:
        """`{"predictions": [{"index", "label", "score"}]}` for each image, best first."""
        return self._task("/classify", images, model=model, top_k=top_k)

    def zero_shot(
        self,
        images: Sequence[Image],
        labels: Sequence[str] | None = None,
        *,
        model: str | None = None,
        templates: Sequence[str] | None = None,
        multi_label: bool | None = None,
    ) -> list[Entry]:
        """As `classify`, with labels of one's own."""
        return self._task(
            "/zero-shot",
            images,
            labels=labels,
            model=model,
            templates=templates,
            multi_label=multi_label,
        )

    def embed(
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
        return self._task(
            "/embed",
            images,
            model=model,
            pooling=pooling,
            normalize=normalize,
            dimensions=dimensions,
            truncate=truncate,
        )

    def embed_texts(
        self, texts: Sequence[str], *, model: str | None = None, dimensions: int | None = None
    ) -> list[Entry]:
        """`{"embedding": [...]}` for each text, of a model that embeds texts, too."""
        options = {"model": model, "dimensions": dimensions}
        given = {name: value for name, value in options.items() if value is not None}
        return self._all("/embed", texts, lambda batch: {"json": {"texts": batch, **given}})

    def segment(
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
        return self._task(
            "/segment",
            images,
            model=model,
            output=output,
            threshold=threshold,
            min_area=min_area,
            labels=labels,
            templates=templates,
        )

    def predict(self, images: Sequence[Image], models: Sequence[str]) -> list[Entry]:
        """`{"outputs": {model: ...}}` for each image: what each model's own task returns."""
        return self._task("/predict", images, models=models)

    def models(self) -> list[dict[str, Any]]:
        """Every model of the catalog, with its state."""
        answer = self._send("GET", "/models")
        found: list[dict[str, Any]] = answer["models"]
        return found

    def create_collection(self, name: str, *, model: str | None = None) -> dict[str, Any]:
        """Create a collection, unless it exists with that model."""
        body = {} if model is None else {"model": model}
        found: dict[str, Any] = self._send("PUT", f"/collections/{name}", json=body)
        return found

    def collections(self) -> list[dict[str, Any]]:
        """Every collection, with its model and number of images."""
        answer = self._send("GET", "/collections")
        found: list[dict[str, Any]] = answer["collections"]
        return found

    def delete_collection(self, name: str) -> None:
        """Delete a collection with all its images."""
        self._send("DELETE", f"/collections/{name}")

    def add_images(
        self,
        collection: str,
        images: Sequence[Image],
        *,
        ids: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Scalar]] | None = None,
    ) -> list[Entry]:
        """Add images to a collection: `{"id"}` or `{"error"}` for each."""
        items = entries(images, ids, metadata)
        return self._all(f"/collections/{collection}/images", items, add_request)

    def search(
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
        answer = self._send("POST", f"/collections/{collection}/search", **body)
        hits: list[dict[str, Any]] = answer["hits"]
        return hits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _task(self, path: str, images: Sequence[Image], **parameters: Any) -> list[Entry]:
        return self._all(path, images, lambda batch: task_request(batch, parameters))

    def _all(
        self, path: str, items: Sequence[Any], make: Callable[[Sequence[Any]], dict[str, Any]]
    ) -> list[Entry]:
        """The entries of all items, which are sent in batches."""
        results: list[Entry] = []

        def send(batch: Sequence[Any]) -> list[Entry]:
            found: list[Entry] = self._send("POST", path, **make(batch))["results"]
            return found

        with ThreadPoolExecutor(self._concurrency) as pool:
            for found in pool.map(send, batches(items, self._batch_size)):
                results += found
                if self._progress is not None:
                    self._progress(len(results), len(items))
        return results

    def _send(self, method: str, path: str, **request: Any) -> Any:
        for attempt in range(self._max_tries):
            last = attempt == self._max_tries - 1
            response = None
            try:
                response = self._http.request(method, path, **request)
                if response.status_code not in RETRY_STATUSES or last:
                    break
            except httpx.ConnectError:
                if last:
                    raise
            time.sleep(wait_before_retry(attempt, response))
        assert response is not None
        return check(response).json() if response.content else None
