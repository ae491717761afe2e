"""Descriptions of many models, made without keeping other requests waiting."""

import asyncio
from collections.abc import Callable, Iterable
from typing import TypeVar

Description = TypeVar("Description")

# Models that are described before other requests get a turn: some 10 ms.
AT_ONCE = 200


async def describe_each(
    names: Iterable[str], describe: Callable[[str], Description]
) -> dict[str, Description]:
    """What `describe` returns for each name."""
    described = {}
    for place, name in enumerate(names, 1):
        described[name] = describe(name)
        if place % AT_ONCE == 0:
            await asyncio.sleep(0)
    return described
