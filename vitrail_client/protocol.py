"""What both clients share: requests, errors, and when to try again. Nothing here waits."""

import base64
import email.utils
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx

# An encoded image, or the path of one.
Image = bytes | str | Path
# An entry of `results`: what the route returns for an image, or `{"error": {...}}`.
Entry = dict[str, Any]
Scalar = str | int | float | bool | None

DEFAULT_URL = "http://127.0.0.1:8000"
RETRY_STATUSES = (429, 503)
FIRST_WAIT_S = 0.5
MAX_WAIT_S = 30.0

T = TypeVar("T")


class VitrailError(Exception):
    """An answer with an error.

    Args:
        status: the HTTP status.
        problem: the members of `application/problem+json`: `title`, `detail`, `request_id`, ...
    """

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(f"{status} {problem.get('title', '')}: {problem.get('detail', '')}")
        self.status = status
        self.problem = problem


def read_image(image: Image) -> bytes:
    """The encoded image.

    Raises:
        OSError: the file cannot be read.
    """
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def encode_image(image: Image) -> dict[str, str]:
    """The image as JSON bodies have it."""
    return {"base64": base64.b64encode(read_image(image)).decode()}


def task_request(images: Sequence[Image], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a task's request, as arguments of httpx."""
    sent = {name: value for name, value in parameters.items() if value is not None}
    return {"json": {"images": [encode_image(image) for image in images], **sent}}


def query_request(
    image: Image | None,
    text: str | None,
    vector: Sequence[float] | None,
    k: int,
    where: Mapping[str, Scalar] | None,
) -> dict[str, Any]:
    """The body of a collection's search, as arguments of httpx."""
    query: dict[str, Any] = {"k": k, "filter": dict(where or {})}
    if image is not None:
        query["image"] = encode_image(image)
    if text is not None:
        query["text"] = text
    if vector is not None:
        query["vector"] = list(vector)
    return {"json": query}


def entries(
    images: Sequence[Image],
    ids: Sequence[str] | None,
    metadata: Sequence[Mapping[str, Scalar]] | None,
) -> list[dict[str, Any]]:
    """Images to add to a collection, without their content: `path_or_bytes`, `id`, `metadata`."""
    for name, values in (("ids", ids), ("metadata", metadata)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"{len(images)} images and {len(values)} {name}")
    return [
        {"image": image}
        | ({} if ids is None else {"id": ids[place]})
        | ({} if metadata is None else {"metadata": dict(metadata[place])})
        for place, image in enumerate(images)
    ]


def add_request(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The body that adds images to a collection, as arguments of httpx."""
    images = []
    for item in items:
        others = {name: value for name, value in item.items() if name != "image"}
        images.append(encode_image(item["image"]) | others)
    return {"json": {"images": images}}


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items, some at a time."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def wait_before_retry(attempt: int, response: httpx.Response | None) -> float:
    """Seconds until a request may be sent again.

    Args:
        attempt: 0 after the first one.
        response: with `Retry-After` in seconds or as a date; None if there was no answer.
    """
    wait_s: float = FIRST_WAIT_S * 2**attempt
    if response is not None and (header := response.headers.get("Retry-After")):
        try:
            wait_s = float(header)
        except ValueError:
            date = email.utils.parsedate_to_datetime(header)
            wait_s = date.timestamp() - time.time()
    return min(max(wait_s, 0.0), MAX_WAIT_S)


def check(response: httpx.Response) -> httpx.Response:
    """The response, if it is one of success.

    Raises:
        VitrailError: it is not.
    """
    if response.is_success:
        return response
    try:
        problem = response.json()
    except ValueError:
        problem = {"title": response.reason_phrase, "detail": response.text[:500]}
    raise VitrailError(response.status_code, problem)
