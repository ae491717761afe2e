"""The store that the settings name, opened when it is first used."""

import asyncio
from pathlib import Path

from models.checkpoints.store import default_store_path
from service.errors import UnavailableError
from service.search.collection import VectorStore


class StoreOpener:
    """Opens the store once. LanceDB takes a second to import, and many servers never need it."""

    def __init__(self, location: str) -> None:
        """
        Args:
            location: a folder, or a `postgresql://` URL; empty for `collections` in the store.
        """
        self._location = location
        self._store: VectorStore | None = None
        self._opening = asyncio.Lock()

    async def get(self) -> VectorStore:
        """The store.

        Raises:
            UnavailableError: its package is not installed, or its database cannot be reached.
        """
        async with self._opening:
            if self._store is None:
                self._store = await _open(self._location)
            return self._store

    async def close(self) -> None:
        """Close the store if it was opened."""
        if self._store is not None:
            await self._store.close()


async def _open(location: str) -> VectorStore:
    if location.startswith(("postgresql://", "postgres://")):
        try:
            from service.search.postgres import PostgresStore
        except ImportError as error:
            raise UnavailableError(
                "collections in PostgreSQL need psycopg: pip install 'vitrail[postgres]'"
            ) from error
        return await PostgresStore.open(location)
    try:
        await asyncio.to_thread(__import__, "lancedb")
        from service.search.lance import LanceStore
    except ImportError as error:
        raise UnavailableError("collections need LanceDB: pip install lancedb") from error
    folder = Path(location) if location else default_store_path() / "collections"
    return await LanceStore.open(folder)
