"""Work on several workers at once, and their results as one."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from service.errors import ServiceError
from service.types import ImageResult, InferResult


async def run_all(work: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All results, or the first error; the others are cancelled then."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(item) for item in work]
    except* Exception as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def merge(
    count: int, parts: Sequence[Sequence[int]], results: Sequence[InferResult]
) -> InferResult:
    """Several workers' results as one. An image that failed on a worker fails its calls there."""
    models: list[Any] = [None] * count
    outputs: list[list[Any]] = [[None] * count for _ in results[0].images]
    for places, result in zip(parts, results, strict=True):
        for i, used in zip(places, result.models, strict=True):
            models[i] = used
        for row, image in zip(outputs, result.images, strict=True):
            for position, i in enumerate(places):
                row[i] = image.error or image.outputs[position]
    images = []
    for n, row in enumerate(outputs):
        errors = [output for output in row if isinstance(output, ServiceError)]
        timing = results[0].images[n].timing
        if len(errors) == count:
            images.append(ImageResult(error=errors[0], timing=timing))
        else:
            images.append(ImageResult(row, timing=timing))
    return InferResult(models, images)
