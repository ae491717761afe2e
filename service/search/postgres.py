"""Collections in PostgreSQL with pgvector (https://github.com/pgvector/pgvector), 0.8 or newer.

A table lists the collections; each has a table of its own, because an index needs vectors of one
length.
"""

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any, LiteralString, TypeVar

import numpy as np
from psycopg import AsyncConnection, errors, sql
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool

from service.errors import NotFoundError, UnavailableError
from service.search.collection import Collection, Hit, Item, Metadata, check_same

T = TypeVar("T")
MAX_CONNECTIONS = 8
CONNECT_S = 10
MAX_INDEXED_DIMENSIONS = 2000  # pgvector's limit for an index of float32
PREFIX = "vitrail_collection_"
MAX_NAME = 63  # PostgreSQL's limit for the name of a table

_SETUP = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE IF NOT EXISTS vitrail_collections (
    name text PRIMARY KEY, model text NOT NULL, model_digest text NOT NULL,
    preprocess_digest text NOT NULL, dimensions integer NOT NULL
);
"""
_COLUMNS = """
SELECT table_name, array_agg(column_name::text) FROM information_schema.columns
WHERE table_schema = current_schema() AND table_name = ANY(%s) GROUP BY table_name
"""
_LOCK = 0x76697472  # held while tables are made, which PostgreSQL cannot do twice at a time


class PostgresStore:
    """Tables of one database."""

    def __init__(self, pool: AsyncConnectionPool[AsyncConnection[Any]]) -> None:
        self._pool = pool

    @classmethod
    async def open(cls, url: str) -> "PostgresStore":
        """Connect, and create what the database lacks.

        Raises:
            UnavailableError: the database cannot be reached.
        """
        pool: AsyncConnectionPool[AsyncConnection[Any]] = AsyncConnectionPool(
            url, min_size=1, max_size=MAX_CONNECTIONS, open=False, timeout=CONNECT_S
        )
        try:
            await pool.open(wait=True, timeout=CONNECT_S)
            await _prepare(pool)
        except Exception as error:
            await pool.close()
            raise UnavailableError(f"the collections' database: {error}") from error
        return cls(pool)

    async def _do(self, name: str, work: Callable[[AsyncConnection[Any]], Awaitable[T]]) -> T:
        """Work on a collection's table, in one transaction.

        Raises:
            NotFoundError: there is no such table.
        """
        try:
            try:
                async with self._pool.connection() as connection:
                    return await work(connection)
            except errors.UndefinedColumn:  # a server of an older version made the table meanwhile
                await _prepare(self._pool)
                async with self._pool.connection() as connection:
                    return await work(connection)
        except errors.UndefinedTable as error:
            raise _missing(name) from error

    async def create(self, collection: Collection) -> bool:
        table = _table(collection.name)
        async with self._pool.connection() as connection:
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            added = await connection.execute(
                "INSERT INTO vitrail_collections VALUES (%s, %s, %s, %s, %s) "
                "ON CONFLICT DO NOTHING",
                astuple(collection),
            )
            if not added.rowcount:
                return False
            size = sql.Literal(collection.dimensions)
            await connection.execute(
                sql.SQL(
                    "CREATE TABLE {} (id text PRIMARY KEY, embedding vector({}) NOT NULL, "
                    "metadata jsonb NOT NULL, thumbnail bytea)"
                ).format(table, size)
            )
            await connection.execute(
                sql.SQL("CREATE INDEX ON {} USING gin (metadata jsonb_path_ops)").format(table)
            )
            if collection.dimensions <= MAX_INDEXED_DIMENSIONS:
                await connection.execute(
                    sql.SQL("CREATE INDEX ON {} USING hnsw (embedding vector_cosine_ops)").format(
                        table
                    )
                )
        return True

    async def collections(self) -> Sequence[tuple[Collection, int]]:
        async with self._pool.connection() as connection:
            found = await connection.execute("SELECT name FROM vitrail_collections ORDER BY name")
            names = [name for (name,) in await found.fetchall()]
        collections = []
        for name in names:
            try:
                collections.append(await self.get(name))
            except NotFoundError:  # deleted meanwhile, or its table is gone
                continue
        return collections

    async def get(self, name: str) -> tuple[Collection, int]:
        async def describe(connection: AsyncConnection[Any]) -> tuple[Collection, int]:
            found = await _locked(connection, name)
            counted = await connection.execute(
                sql.SQL("SELECT count(*) FROM {}").format(_table(name))
            )
            [count] = await counted.fetchone() or [0]
            return found, count

        return await self._do(name, describe)

    async def delete(self, name: str) -> None:
        async with self._pool.connection() as connection:
            gone = await connection.execute(
                "DELETE FROM vitrail_collections WHERE name = %s", (name,)
            )
            if not gone.rowcount:
                raise _missing(name)
            await connection.execute(sql.SQL("DROP TABLE {}").format(_table(name)))

    async def add(self, collection: Collection, items: Sequence[Item]) -> None:
        statement = sql.SQL(
            "INSERT INTO {} (id, embedding, metadata, thumbnail) VALUES (%s, %s::vector, %s, %s) "
            "ON CONFLICT (id) DO UPDATE SET embedding = excluded.embedding, "
            "metadata = excluded.metadata, thumbnail = excluded.thumbnail"
        ).format(_table(collection.name))
        rows = [
            (item.id, _text(item.embedding), Jsonb(dict(item.metadata)), item.thumbnail)
            for item in items
        ]
        # in one order, so that two requests with the same ids do not lock each other out
        rows.sort(key=lambda row: str(row[0]))

        async def insert(connection: AsyncConnection[Any]) -> None:
            check_same(collection, await _locked(connection, collection.name))
            async with connection.cursor() as cursor:
                await cursor.executemany(statement, rows)

        await self._do(collection.name, insert)

    async def remove(self, name: str, images: Sequence[str]) -> int:
        statement = sql.SQL("DELETE FROM {} WHERE id = ANY(%s)").format(_table(name))

        async def delete(connection: AsyncConnection[Any]) -> int:
            return (await connection.execute(statement, (list(images),))).rowcount

        return await self._do(name, delete)

    async def images(self, name: str, after: str, count: int) -> Mapping[str, Metadata]:
        return await self._metadata(name, "WHERE id > %s ORDER BY id LIMIT %s", after, count)

    async def find(self, name: str, ids: Sequence[str]) -> Mapping[str, Metadata]:
        return await self._metadata(name, "WHERE id = ANY(%s)", list(ids))

    async def _metadata(
        self, name: str, which: LiteralString, *values: object
    ) -> Mapping[str, Metadata]:
        statement = sql.SQL("SELECT id, metadata FROM {} {}").format(_table(name), sql.SQL(which))

        async def select(connection: AsyncConnection[Any]) -> Mapping[str, Metadata]:
            return dict(await (await connection.execute(statement, values)).fetchall())

        return await self._do(name, select)

    async def search(
        self,
        collection: Collection,
        query: np.ndarray,
        count: int,
        where: Metadata,
        *,
        thumbnails: bool = False,
    ) -> Sequence[Hit]:
        thumbnail = sql.SQL("thumbnail" if thumbnails else "NULL")
        statement = sql.SQL(
            "SELECT id, 1 - (embedding <=> %(query)s::vector), metadata, {} FROM {} "
            "WHERE metadata @> %(where)s ORDER BY embedding <=> %(query)s::vector LIMIT %(count)s"
        ).format(thumbnail, _table(collection.name))
        values = {"query": _text(query), "where": Jsonb(dict(where)), "count": count}

        async def select(connection: AsyncConnection[Any]) -> Sequence[Hit]:
            check_same(collection, await _locked(connection, collection.name))
            # a filter that few images pass: the index goes on until there are enough
            await connection.execute("SET LOCAL hnsw.iterative_scan = strict_order")
            await connection.execute(f"SET LOCAL hnsw.ef_search = {max(100, min(count, 1000))}")
            found = await connection.execute(statement, values)
            return [Hit(*row) for row in await found.fetchall()]

        return await self._do(collection.name, select)

    async def close(self) -> None:
        await self._pool.close()


async def _locked(connection: AsyncConnection[Any], name: str) -> Collection:
    """A collection, whose table is not deleted until the transaction ends.

    Raises:
        NotFoundError: it does not exist.
        psycopg.errors.UndefinedTable: as well.
    """
    await connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(_table(name)))
    found = await connection.execute(
        "SELECT name, model, model_digest, preprocess_digest, dimensions "
        "FROM vitrail_collections WHERE name = %s",
        (name,),
    )
    if (row := await found.fetchone()) is None:
        raise _missing(name)
    keys = ("name", "model", "model_digest", "preprocess_digest", "dimensions")
    return Collection(**dict(zip(keys, row, strict=True)))


async def _prepare(pool: AsyncConnectionPool[AsyncConnection[Any]]) -> None:
    """Create what the database lacks, and bring its tables up to date."""
    async with pool.connection() as connection:
        await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        await connection.execute(_SETUP)
        await _upgrade(connection)


async def _upgrade(connection: AsyncConnection[Any]) -> None:
    """Give the tables of older versions their names and the column that they lack. The others are
    not touched, because a change waits for all who read a table, and all others wait for it."""
    found = await connection.execute("SELECT name FROM vitrail_collections")
    for (name,) in await found.fetchall():
        table, older = _table_name(name), (PREFIX + name)[:MAX_NAME]
        known = await connection.execute(_COLUMNS, ([table, older],))
        columns = dict(await known.fetchall())
        if not columns:  # somebody has dropped it
            continue
        if table not in columns:
            renamed = sql.SQL("ALTER TABLE {} RENAME TO {}")
            await connection.execute(renamed.format(sql.Identifier(older), _table(name)))
        if "thumbnail" not in (columns.get(table) or columns[older]):
            added = sql.SQL("ALTER TABLE {} ADD COLUMN thumbnail bytea")
            await connection.execute(added.format(_table(name)))


def _table_name(name: str) -> str:
    """PostgreSQL cuts longer names off, and would take two that begin alike for one."""
    table = PREFIX + name
    if len(table) <= MAX_NAME:
        return table
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{table[: MAX_NAME - len(digest) - 1]}_{digest}"


def _table(name: str) -> sql.Identifier:
    return sql.Identifier(_table_name(name))


def _missing(name: str) -> NotFoundError:
    return NotFoundError(f"no collection {name!r}", field="name")


def _text(vector: np.ndarray) -> str:
    return "[" + ",".join(map(str, vector.astype(np.float32).tolist())) + "]"
