"""Work that ends when the client of its request disconnects.

The server's protocol object learns of a disconnect first and cancels the request's task. Waiting
for ASGI's `http.disconnect` would take a second task for every request.
"""

import asyncio
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect

_TASK = "vitrail.task"
_IS_DISCONNECTED = "vitrail.disconnected"


@contextmanager
def cancelled_by_disconnect(scope: MutableMapping[str, Any]) -> Iterator[None]:
    """A context that `disconnect` cancels.

    Raises:
        ClientDisconnect: the client disconnected, in the context or before it.
    """
    state = scope["state"]
    if _IS_DISCONNECTED in state:
        raise ClientDisconnect
    task = asyncio.current_task()
    assert task is not None
    state[_TASK] = task
    try:
        yield
    except asyncio.CancelledError as error:
        if _IS_DISCONNECTED not in state:
            raise
        task.uncancel()
        raise ClientDisconnect from error
    finally:
        del state[_TASK]


def disconnect(scope: Mapping[str, Any]) -> None:
    """Cancel what runs for a request. Called by the server when its connection is lost."""
    state = scope.get("state", {})
    state[_IS_DISCONNECTED] = True
    if (task := state.get(_TASK)) is not None:
        task.cancel()
