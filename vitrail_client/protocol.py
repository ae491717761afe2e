"""What every request has in common: images, batches, errors, and when to try again."""

import base64
import email.utils
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
# Bytes of the images of one request, which are a third more in JSON. Servers take 64 MiB.
MAX_BATCH_BYTES = 32 * 2**20

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


def encode_image(image: Image) -> dict[str, str]:
    """The image as JSON bodies have it.

    Raises:
        OSError: the file cannot be read.
    """
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    return {"base64": base64.b64encode(content).decode()}


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None: a server's default applies to the others."""
    return {name: value for name, value in options.items() if value is not None}


def split(items: Sequence[T], count: int, size: Callable[[T], int]) -> list[Sequence[T]]:
    """Batches of at most `count` items that have MAX_BATCH_BYTES together, or of one larger item.

    Args:
        size: bytes of an item.
    """
    batches: list[Sequence[T]] = []
    start = total = 0
    for place, item in enumerate(items):
        total += (added := size(item))
        if place - start == count or (total > MAX_BATCH_BYTES and place > start):
            batches.append(items[start:place])
            start, total = place, added
    if start < len(items):
        batches.append(items[start:])
    return batches


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
            with suppress(ValueError):  # neither seconds nor a date
                date = email.utils.parsedate_to_datetime(header)
                wait_s = date.timestamp() - time.time()
    return min(max(wait_s, 0.0), MAX_WAIT_S)


def parse(response: httpx.Response) -> Any:
    """The JSON of a response; None if it has no body.

    Raises:
        VitrailError: the request failed.
    """
    if response.is_success:
        return response.json() if response.content else None
    try:
        problem = response.json()
    except ValueError:
        problem = {"title": response.reason_phrase, "detail": response.text[:500]}
    raise VitrailError(response.status_code, problem)
