"""Answers in JSON.

A large one takes its time: hundreds of milliseconds for a million numbers. It is made in a thread,
in which others run between its parts.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic_core import to_json

from service.errors import ServiceError
from service.gateway.rest.content import share_of
from service.types import InferResult

# What is made of fewer values takes milliseconds.
SLOW_VALUES = 20_000
# What an answer takes for each value: bytes become base64 and then JSON, numbers Python's objects
# and then JSON.
BYTES = 3
NUMBERS = 50

T = TypeVar("T")


class JsonResponse(Response):
    """JSON, written many times faster than by the standard library where it has many numbers."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        if not isinstance(content, dict):
            return to_json(content)
        return b"{%s}" % b",".join(
            b"%s:%s" % (to_json(name), _written(value)) for name, value in content.items()
        )


def _written(value: Any) -> bytes:
    """The JSON of an answer's member. The items of a list, which may be masks of many megabytes,
    are written one by one: no other thread runs while one is."""
    if isinstance(value, list) and len(value) > 1:
        return b"[%s]" % b",".join(map(to_json, value))
    return to_json(value)


async def made_of(
    request: Request, result: InferResult, make: Callable[..., T], *arguments: Any
) -> T:
    """`make(*arguments)`, which makes an answer of a result; in a thread if that is large. What is
    made of a large one counts as held by the request.

    Raises:
        PayloadTooLargeError: the answer would take more than all requests together may hold.
        UnavailableError: all requests together hold too much.
    """
    arrays = [
        array
        for image in result.images
        for output in image.outputs
        if not isinstance(output, ServiceError)
        for array in output.values()
    ]
    if sum(array.size for array in arrays) < SLOW_VALUES:
        return make(*arguments)
    share = share_of(request)
    share.make(sum((BYTES if array.itemsize == 1 else NUMBERS) * array.size for array in arrays))
    return await share.in_thread(make, *arguments)
