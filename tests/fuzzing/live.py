"""Hostile inputs over HTTP, to a running server."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx

from tests.fuzzing.bodies import hostile_request
from tests.fuzzing.images import hostile_image

# Images of a request.
TOGETHER = 16
TIMEOUT_S = 120


class ServerFault(AssertionError):
    """An answer that is the server's fault, or none."""


class Live:
    """A client of a server. May be used from several threads."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=TIMEOUT_S)
        self._document: dict[str, Any] = self._client.get("/openapi.json").json()

    def try_images(self, numbers: Sequence[int]) -> Counter[str]:
        """Classify the images of these numbers, some in a request.

        Returns:
            How many had each outcome.

        Raises:
            ServerFault: an image, or the request, got a status of 500 or more.
        """
        images = [hostile_image(number) for number in numbers]
        files = [("image", (f"{n}.jpg", image)) for n, image in zip(numbers, images, strict=True)]
        answer = self._client.post("/classify", files=files)
        if answer.status_code != 200:
            check(answer, f"images {list(numbers)}")
            return Counter({str(answer.status_code): len(images)})
        outcomes: Counter[str] = Counter()
        for number, entry in zip(numbers, answer.json()["results"], strict=True):
            status = entry.get("error", {}).get("status", "ok")
            if status != "ok" and status >= 500:
                raise ServerFault(f"image {number}: {entry['error']}")
            outcomes[str(status)] += 1
        return outcomes

    def try_request(self, number: int) -> str:
        """Send the request of that number.

        Returns:
            The status; `not sent` if a client cannot send it.

        Raises:
            ServerFault: a status of 500 or more, other than 504, or no answer.
        """
        request = hostile_request(number, self._document)
        headers = [
            (name.encode(), value.encode("latin-1")) for name, value in request.headers.items()
        ]
        try:
            answer = self._client.request(
                request.method, request.path, headers=headers, content=request.content
            )
        except httpx.LocalProtocolError:
            return "not sent"
        except httpx.TransportError as error:
            raise ServerFault(f"request {number}, {request.path}: {error!r}") from error
        if answer.status_code != 504:  # some ask for an answer within a millisecond
            check(answer, f"request {number}, {request.method} {request.path}")
        return str(answer.status_code)

    def close(self) -> None:
        self._client.close()


def check(answer: httpx.Response, what: str) -> None:
    """
    Raises:
        ServerFault: the status is 500 or more, or the answer is an error that is no problem.
    """
    if answer.status_code >= 500:
        raise ServerFault(f"{what}: {answer.status_code} {answer.text[:300]}")
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        media_type = answer.headers.get("content-type")
        if media_type != "application/problem+json":
            raise ServerFault(f"{what}: {answer.status_code} as {media_type}: {answer.text[:300]}")
