"""Answers in JSON.

A large one takes its time: hundreds of milliseconds for a million numbers. It is made in a thread,
in which others run between its parts.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Response
from pydantic_core import to_json

from service.errors import ServiceError
from service.types import InferResult

# What is made of fewer values takes milliseconds.
SLOW_VALUES = 20_000

T = TypeVar("T")


class JsonResponse(Response):
    """JSON, written many times faster than by the standard library where it has many numbers."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


async def made_of(result: InferResult, make: Callable[..., T], *arguments: Any) -> T:
    """`make(*arguments)`, which makes an answer of a result; in a thread if that is large."""
    if _values(result) < SLOW_VALUES:
        return make(*arguments)
    return await asyncio.to_thread(make, *arguments)


def _values(result: InferResult) -> int:
    return sum(
        array.size
        for image in result.images
        for output in image.outputs
        if not isinstance(output, ServiceError)
        for array in output.values()
    )
