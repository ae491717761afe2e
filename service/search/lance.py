"""Collections in LanceDB: a folder of files, written by any number of processes.

https://lancedb.github.io/lancedb/. Each collection is a table; its schema's metadata says what the
collection is. A write adds a version of the table, which is complete or absent after a kill.
Deletion and creation are excluded while a table is used: Lance names files by their paths, so that
what began with a table would write into the next one of its name.
"""

import asyncio
import json
import logging
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import BTree, IvfFlat, IvfRq
from lancedb.query import ColumnOrdering

from service.errors import DISK_FULL, InsufficientStorageError, NotFoundError
from service.search.collection import (
    Collection,
    Hit,
    Item,
    Metadata,
    check_same,
)
from service.search.lance_rows import (
    THUMBNAIL,
    collection_of,
    has_all,
    id_in,
    quoted,
    rows_of,
    schema_of,
)
from service.search.locks import CollectionLocks

logger = logging.getLogger(__name__)

# Folders beside the tables: files of locks, and tables that are being deleted.
LOCKS, DELETED = ".locks", ".deleted"
BY_ID = ColumnOrdering(column_name="id")
# From so many images on, an index finds them; below, every vector is compared.
INDEXED_FROM = 50_000
# Writes between two runs of maintenance: each write leaves a small file and a version.
WRITES = 64
# Times that a table of an older version is tried to be given its column.
TRIES = 10
# How long an old version stays for the requests that read it.
KEEP_VERSIONS = timedelta(minutes=10)
# Of an indexed search: the cells that are read, and how many times `count` vectors are compared
# exactly after the index has found them.
PROBES = 48
REFINE = 12
# Of vectors with fewer dimensions, one bit each says too little.
FEWEST_BITS = 128


class LanceStore:
    """A folder of LanceDB tables."""

    def __init__(self, connection: Any, folder: Path) -> None:
        self._db = connection
        self._folder = folder
        self._locks = CollectionLocks(folder / LOCKS)
        self._writes: dict[str, int] = {}
        self._maintained: dict[str, asyncio.Task[None]] = {}
        self._maintaining = asyncio.Lock()  # one at a time: it takes all cores

    @classmethod
    async def open(cls, folder: Path) -> "LanceStore":
        """Open the folder, or create it."""
        await asyncio.to_thread(_prepare, folder)
        # zero: a read sees what other processes have written
        connection = await lancedb.connect_async(folder, read_consistency_interval=timedelta(0))
        return cls(connection, folder)

    async def create(self, collection: Collection) -> bool:
        # most often it is there, and its users need not be waited for
        with suppress(NotFoundError):
            async with self._table(collection.name):
                return False
        schema = schema_of(collection)
        try:
            async with self._locks.changing(collection.name):
                with _disk_errors():
                    await self._db.create_table(collection.name, schema=schema)
        except ValueError as error:
            if "already exists" in str(error):
                return False
            raise
        return True

    async def collections(self) -> Sequence[tuple[Collection, int]]:
        found = []
        for name in sorted(await self._names()):
            try:
                found.append(await self.get(name))
            except NotFoundError:  # deleted meanwhile
                continue
        return found

    async def get(self, name: str) -> tuple[Collection, int]:
        async with self._table(name) as table:
            return collection_of(await table.schema()), await table.count_rows()

    async def delete(self, name: str) -> None:
        if (running := self._maintained.pop(name, None)) is not None:
            running.cancel()
        gone = self._folder / DELETED / uuid4().hex
        async with self._locks.changing(name):
            await self._open(name)
            # at once, so that a kill does not leave a part of it
            (self._folder / f"{name}.lance").rename(gone)
        await asyncio.to_thread(shutil.rmtree, gone, ignore_errors=True)

    async def add(self, collection: Collection, items: Sequence[Item]) -> None:
        async with self._table(collection.name) as table:
            check_same(collection, collection_of(await table.schema()))
            with _disk_errors():
                schema = await _complete(table)
            rows = rows_of(items, schema)
            merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            with _disk_errors():
                await merge.execute(rows)
        self._written(collection.name)

    async def remove(self, name: str, images: Sequence[str]) -> int:
        async with self._table(name) as table:
            with _disk_errors():
                result = await table.delete(id_in(images))
        self._written(name)
        return int(result.num_deleted_rows)

    async def images(self, name: str, after: str, count: int) -> Mapping[str, Metadata]:
        async with self._table(name) as table:
            query = table.query().select(["id", "metadata"]).order_by([BY_ID]).limit(count)
            return await _metadata(query.where(f"id > {quoted(after)}"))

    async def find(self, name: str, ids: Sequence[str]) -> Mapping[str, Metadata]:
        if not ids:
            return {}
        async with self._table(name) as table:
            return await _metadata(table.query().select(["id", "metadata"]).where(id_in(ids)))

    async def search(
        self,
        collection: Collection,
        query: np.ndarray,
        count: int,
        where: Metadata,
        *,
        thumbnails: bool = False,
    ) -> Sequence[Hit]:
        async with self._table(collection.name) as table:
            check_same(collection, collection_of(schema := await table.schema()))
            search = table.query().nearest_to(query).distance_type("cosine").limit(count)
            search = search.nprobes(PROBES).refine_factor(REFINE)
            shown = [THUMBNAIL] if thumbnails and THUMBNAIL in schema.names else []
            search = search.select(["id", "metadata", "_distance", *shown])
            if where:
                search = search.where(has_all(where))
            rows = await search.to_list()
        return [
            Hit(
                row["id"],
                1 - row["_distance"],
                json.loads(row["metadata"]),
                row.get(THUMBNAIL),
            )
            for row in rows
        ]

    async def close(self) -> None:
        for task in self._maintained.values():
            task.cancel()
        await asyncio.gather(*self._maintained.values(), return_exceptions=True)
        self._db.close()

    async def _names(self) -> list[str]:
        names: list[str] = []
        page = ""
        while True:
            answer = await self._db.list_tables(page_token=page or None, limit=1000)
            names += answer.tables
            if not (page := answer.page_token or ""):
                return names

    @asynccontextmanager
    async def _table(self, name: str) -> AsyncIterator[Any]:
        """A context in which a table is used, and not deleted."""
        async with self._locks.using(name):
            yield await self._open(name)

    async def _open(self, name: str) -> Any:
        try:
            return await self._db.open_table(name)
        except ValueError as error:
            raise NotFoundError(f"no collection {name!r}", field="name") from error

    def _written(self, name: str) -> None:
        """Start maintenance in the background once in a while."""
        self._writes[name] = self._writes.get(name, 0) + 1
        running = self._maintained.get(name)
        if self._writes[name] >= WRITES and (running is None or running.done()):
            self._writes[name] = 0
            self._maintained[name] = asyncio.create_task(self.maintain(name))

    async def maintain(self, name: str) -> None:
        """Join small files, remove old versions, and build or extend the index."""
        try:
            async with self._maintaining, self._table(name) as table:
                await self._maintain(table)
        except Exception:  # it is tried again after more writes; searches are exact until then
            logger.exception("maintenance of the collection %s failed", name)

    async def _maintain(self, table: Any) -> None:
        await table.optimize(cleanup_older_than=KEEP_VERSIONS)
        if await table.count_rows() < INDEXED_FROM:
            return
        indexed = {name for index in await table.list_indices() for name in index.columns}
        if "vector" not in indexed:
            await table.create_index("vector", config=_index(await table.schema()))
        if "id" not in indexed:  # a write looks for the ids that it replaces
            await table.create_index("id", config=BTree())


def _prepare(folder: Path) -> None:
    """Create what a folder lacks, and remove what was left of deletions."""
    for inner in (folder / LOCKS, folder / DELETED):
        inner.mkdir(parents=True, exist_ok=True)
    for left in (folder / DELETED).iterdir():
        shutil.rmtree(left, ignore_errors=True)


async def _complete(table: Any) -> pa.Schema:
    """The schema of a table, which gets the column that older versions' tables lack."""
    for left in reversed(range(TRIES)):
        if THUMBNAIL in (schema := await table.schema()).names:
            break
        try:
            await table.add_columns(pa.field(THUMBNAIL, pa.binary()))
        except (RuntimeError, ValueError):  # another one has written, or added it
            if not left:
                raise
    return schema


async def _metadata(query: Any) -> dict[str, Metadata]:
    return {row["id"]: json.loads(row["metadata"]) for row in await query.to_list()}


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A context in which a full disk is an error of its own.

    Raises:
        InsufficientStorageError: the disk is full, or the quota is used up.
    """
    try:
        yield
    except RuntimeError as error:  # Lance has no types for errors of the system
        if any(f"(os error {number})" in str(error) for number in DISK_FULL):
            raise InsufficientStorageError("the server's disk is full") from error
        raise


def _index(schema: pa.Schema) -> IvfRq | IvfFlat:
    """The index of vectors: RaBitQ's one bit for each dimension (arXiv 2405.12497), which needs a
    multiple of eight and is coarse for few; else the vectors themselves."""
    dimensions = schema.field("vector").type.list_size
    if dimensions % 8 == 0 and dimensions >= FEWEST_BITS:
        return IvfRq(distance_type="cosine")
    return IvfFlat(distance_type="cosine")
