"""`vitrail index`: adds images to a collection of the server, to be searched there."""

import base64
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.progress import Progress

from service.cli.client import (
    DEFAULT_URL,
    MAX_TRIES,
    RETRY_STATUSES,
    Key,
    Model,
    Paths,
    Url,
    errors,
    expand,
)

BATCH_IMAGES = 16
BATCH_BYTES = 16 * 2**20
MAX_WAIT_S = 30.0


def index(
    paths: Paths,
    collection: Annotated[str, typer.Option(help="Its name; created if there is none.")],
    url: Url = DEFAULT_URL,
    key: Key = None,
    model: Model = None,
) -> None:
    """Add images to a collection, which `vitrail search NAME` searches.

    An image's id is its path, so that indexing a folder again updates it.
    """
    files = list(expand(paths))
    if not files:
        errors.print("no image among the given paths")
        raise typer.Exit(1)
    server = CollectionClient(url, key, collection)
    server.create(model)
    failed = 0
    with Progress(console=errors, disable=not errors.is_terminal) as progress:
        bar = progress.add_task("index", total=len(files))
        for batch in _batches(files):
            for result in server.add(batch):
                if "error" in result:
                    failed += 1
                    text = f"{result.get('id', '')}: {result['error']['detail']}"
                    errors.print(text, markup=False, highlight=False)
            progress.advance(bar, len(batch))
    count = server.describe()["images"]
    errors.print(f"{len(files) - failed} images added, {count} in {collection}", highlight=False)
    if failed:
        raise typer.Exit(1)


class CollectionClient:
    """A collection of a server. Errors are printed, and end the command."""

    def __init__(self, url: str, key: str | None, name: str) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=300)
        self._path = f"/collections/{name}"

    def create(self, model: str | None) -> None:
        """Create the collection, unless it exists with that model."""
        known = self._http.get(self._path) if model is None else None
        if known is None or known.status_code != 200:
            self._send("PUT", "", json={} if model is None else {"model": model})

    def describe(self) -> dict[str, Any]:
        """The collection as the server describes it."""
        found: dict[str, Any] = self._send("GET", "")
        return found

    def add(self, lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add images; a result for each, with its id or an error."""
        content = "\n".join(map(json.dumps, lines))
        headers = {"Content-Type": "application/x-ndjson", "X-Priority": "bulk"}
        results: list[dict[str, Any]] = self._send(
            "POST", "/images", content=content, headers=headers
        )["results"]
        return results

    def search(self, **query: Any) -> list[dict[str, Any]]:
        """The hits of a query."""
        hits: list[dict[str, Any]] = self._send("POST", "/search", json=query)["hits"]
        return hits

    def _send(self, method: str, path: str, **request: Any) -> Any:
        try:
            for _ in range(MAX_TRIES):
                response = self._http.request(method, self._path + path, **request)
                if response.status_code not in RETRY_STATUSES:
                    break
                time.sleep(min(float(response.headers.get("Retry-After", 1)), MAX_WAIT_S))
            body = response.json()
        except (httpx.HTTPError, ValueError) as error:
            errors.print(f"{type(error).__name__}: {error}", markup=False, highlight=False)
            raise typer.Exit(1) from error
        if not response.is_success:
            text = f"{response.status_code} {body.get('detail', '')}"
            errors.print(text, markup=False, highlight=False)
            raise typer.Exit(1)
        return body


def encoded(path: Path) -> dict[str, str]:
    """An image file as JSON bodies have it.

    Raises:
        OSError: it cannot be read.
    """
    return {"base64": base64.b64encode(path.read_bytes()).decode()}


def _batches(files: list[Path]) -> Iterator[list[dict[str, Any]]]:
    """Files as objects of NDJSON, some at a time. One that cannot be read has no image, which the
    server reports as its error."""
    batch: list[dict[str, Any]] = []
    size = 0
    for path in files:
        line: dict[str, Any] = {"id": str(path), "metadata": {"folder": path.parent.name}}
        try:
            line |= encoded(path)
        except OSError as error:
            errors.print(f"{path}: {error}", markup=False, highlight=False)
        batch.append(line)
        size += len(line.get("base64", ""))
        if len(batch) >= BATCH_IMAGES or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
