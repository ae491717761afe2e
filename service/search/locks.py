"""Locks of the collections in a folder, which several processes may share."""

import asyncio
import fcntl
import os
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from service.errors import UnavailableError

# Collections share so many locks. Those that share one wait for each other's changes.
LOCKS = 64
# The time for what uses a collection to end. Building an index can take longer.
WAIT_S = 10.0
RETRY_S = 0.005


class CollectionLocks:
    """Keeps collections from being created and deleted while others use them.

    The locks are those of files (flock), so that they hold between processes, and end with them.
    Who changes a collection first locks out those who come next, and then waits for those who use
    it: else there could always be one.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: of the locks' files; it must exist.
        """
        self._folder = folder

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[None]:
        """A context in which a collection is neither created nor deleted.

        Raises:
            UnavailableError: it is being changed, and that does not end.
        """
        next_in = await self._lock(name, "next", fcntl.LOCK_SH)
        try:
            used = await self._lock(name, "use", fcntl.LOCK_SH)
        finally:
            _unlock(next_in)
        try:
            yield
        finally:
            _unlock(used)

    @asynccontextmanager
    async def changing(self, name: str) -> AsyncIterator[None]:
        """A context in which nobody else uses or changes a collection.

        Raises:
            UnavailableError: what uses it does not end.
        """
        next_in = await self._lock(name, "next", fcntl.LOCK_EX)
        try:
            used = await self._lock(name, "use", fcntl.LOCK_EX)
            try:
                yield
            finally:
                _unlock(used)
        finally:
            _unlock(next_in)

    async def _lock(self, name: str, which: str, kind: int) -> int:
        """The descriptor of a file that is locked."""
        path = self._folder / f"{zlib.crc32(name.encode()) % LOCKS}.{which}"
        until = time.monotonic() + WAIT_S
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(opened, kind | fcntl.LOCK_NB)
                    return opened
                except BlockingIOError as error:
                    if time.monotonic() > until:
                        raise UnavailableError(
                            f"the collection {name!r} is in use; try again", retry_after_s=1
                        ) from error
                await asyncio.sleep(RETRY_S)
        except BaseException:
            os.close(opened)
            raise


def _unlock(opened: int) -> None:
    fcntl.flock(opened, fcntl.LOCK_UN)  # closing alone would not, if a fork has the descriptor, too
    os.close(opened)
