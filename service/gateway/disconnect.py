"""Work that ends when the client of its request disconnects.

The server's protocol object learns of a disconnect first and cancels the request's task. Waiting
for ASGI's `http.disconnect` would take a second task for every request.
"""

import asyncio
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect

_KEY = "vitrail.work"


@dataclass(slots=True)
class _Work:
    task: "asyncio.Task[Any]"
    is_disconnected: bool = False


@contextmanager
def cancelled_by_disconnect(scope: MutableMapping[str, Any]) -> Iterator[None]:
    """A context that `disconnect` cancels.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    task = asyncio.current_task()
    assert task is not None
    work = scope["state"][_KEY] = _Work(task)
    try:
        yield
    except asyncio.CancelledError as error:
        if not work.is_disconnected:
            raise
        task.uncancel()
        raise ClientDisconnect from error
    finally:
        del scope["state"][_KEY]


def disconnect(scope: Mapping[str, Any]) -> None:
    """Cancel what runs for a request. Called by the server when its connection is lost."""
    work: _Work | None = scope.get("state", {}).get(_KEY)
    if work is not None:
        work.is_disconnected = True
        work.task.cancel()
