"""Catalogs that change while a server answers: new, changed, broken and removed models."""

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import timm
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file

from models.catalog import load_catalog
from models.errors import CheckpointError
from models.heads.files import encode_head
from models.registry import Registry
from service.errors import UnavailableError
from service.metrics import Metrics
from service.settings import Settings
from service.worker import catalog_watch
from service.worker.backend import LocalBackend
from service.worker.catalog_watch import CatalogWatch
from service.worker.loader import Loader
from tests.conftest import PLAIN, Running, free_port, gateway, running, serving_rpc, wait_until
from tests.service.test_heads import make, upload  # noqa: F401

BASE = """
[trunks.steady]
source = "file:steady.safetensors"
architecture = "test_vit"
[models.steady]
trunk = "steady"
task = "classify"
"""
POLL_S = 0.05


class Folder:
    """A folder of catalogs, and of the weights that they name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.weights("steady", 0)
        self.write("steady", BASE)

    def write(self, name: str, text: str) -> None:
        partial = self.path / f"{name}.partial"
        partial.write_text(text)
        partial.replace(self.path / f"{name}.toml")

    def add(self, name: str, *, more: str = "", file: str = "", **weights: Any) -> None:
        """A trunk and a model of one name, in a file of their own."""
        self.weights(name, **weights)
        self.write(
            file or name,
            f'[trunks.{name}]\nsource = "file:{name}.safetensors"\narchitecture = "test_vit"\n'
            f'[models.{name}]\ntrunk = "{name}"\ntask = "classify"\n{more}',
        )

    def weights(self, name: str, seed: int = 0, *, bytes_kept: int | None = None) -> None:
        torch.manual_seed(seed)
        network = timm.create_model("test_vit")
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        partial = self.path / f"{name}.partial"
        save_file(network.state_dict(), partial)
        if bytes_kept is not None:
            partial.write_bytes(partial.read_bytes()[:bytes_kept])
        partial.replace(self.path / f"{name}.safetensors")

    def copy(self, weights: Path) -> None:
        partial = self.path / "copied.partial"
        shutil.copy(weights, partial)
        partial.replace(self.path / weights.name)

    def remove(self, name: str) -> None:
        (self.path / f"{name}.toml").unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("watched") / "catalog")


@pytest.fixture(scope="module", params=["in one process", "gateway and worker apart"])
def server(folder: Folder, request: pytest.FixtureRequest) -> Iterator[Running]:
    heads = str(folder.path.parent / f"heads {request.param}")
    options = {"catalog_poll_s": POLL_S, "admin_keys": "admin", "heads_folder": heads}
    with running(folder.path, apart="apart" in request.param, **options) as started:
        started.wait_ready()
        started.client.headers["X-API-Key"] = "admin"
        yield started


def model(server: Running, name: str) -> dict[str, Any]:
    described: dict[str, Any] = server.client.get(f"/models/{name}").json()
    return described


def ask(client: httpx.Client, name: str, image: bytes) -> httpx.Response:
    return client.post("/classify", params={"model": name, "top_k": 3}, content=image)


def queues(server: Running, trunk: str) -> list[str]:
    """The keys of a trunk's queues."""
    return [key for key in server.backend.batcher.state()["queues"] if key.startswith(trunk)]


def wait_for(server: Running, name: str, **members: Any) -> dict[str, Any]:
    wait_until(lambda: members.items() <= model(server, name).items())
    return model(server, name)


class Load:
    """Clients that ask without a pause, and keep every answer."""

    def __init__(self, url: str, send: Callable[[httpx.Client], httpx.Response]) -> None:
        self.answers: list[httpx.Response] = []
        self._stop = threading.Event()
        self._url = url
        self._send = send
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]

    def _ask(self) -> None:
        headers = {"X-API-Key": "admin"}
        with httpx.Client(base_url=self._url, verify=PLAIN, timeout=60, headers=headers) as client:
            while not self._stop.is_set():
                self.answers.append(self._send(client))

    def wait(self, count: int) -> None:
        """Until so many more answers are there."""
        enough = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= enough)

    @contextmanager
    def running(self) -> Iterator["Load"]:
        for thread in self._threads:
            thread.start()
        try:
            self.wait(8)
            yield self
            self.wait(8)
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()


def scores(answer: httpx.Response) -> dict[str, float]:
    predictions = answer.json()["results"][0]["predictions"]
    return {each["label"]: each["score"] for each in predictions}


def same(one: dict[str, float], other: dict[str, float]) -> bool:
    return one.keys() == other.keys() and np.allclose(
        list(one.values()), [other[label] for label in one], rtol=1e-3
    )


def version_of(answer: httpx.Response, expected: dict[str, dict[str, float]]) -> str:
    """The one version whose scores an answer has."""
    [digest] = [each for each, wanted in expected.items() if same(scores(answer), wanted)]
    return digest


def test_a_new_model_appears_and_a_removed_one_drains(
    server: Running, folder: Folder, jpegs: dict[str, bytes]
) -> None:
    photo = jpegs["coffee"]
    assert ask(server.client, "passing", photo).status_code == 404
    folder.add("passing")
    wait_for(server, "passing", state="ready")
    assert server.client.get("/readyz").status_code == 200
    load = Load(server.url, lambda client: ask(client, "passing", photo))
    with load.running():
        folder.remove("passing")
        wait_until(lambda: any(a.status_code == 404 for a in list(load.answers)))
    assert {answer.status_code for answer in load.answers} == {200, 404}
    assert ask(server.client, "passing", photo).status_code == 404
    # A gateway learns of it within a second.
    wait_until(lambda: server.client.get("/models/passing").status_code == 404)
    assert "passing" not in {m["name"] for m in server.client.get("/models").json()["models"]}
    wait_until(lambda: server.backend.registry.loaded_trunk("passing") is None)
    assert "passing" not in server.backend.batcher.depth()


def test_changed_weights_serve_while_every_request_is_answered_in_full_by_one_version(
    server: Running, folder: Folder, jpegs: dict[str, bytes]
) -> None:
    photo = jpegs["coffee"]
    folder.add("swapped", seed=1)
    old = wait_for(server, "swapped", state="ready")["model_digest"]
    expected = {old: scores(ask(server.client, "swapped", photo))}
    load = Load(server.url, lambda client: ask(client, "swapped", photo))
    with load.running():
        folder.weights("swapped", seed=2)
        wait_until(lambda: model(server, "swapped").get("model_digest") not in (None, old))
    new = model(server, "swapped")["model_digest"]
    expected[new] = scores(ask(server.client, "swapped", photo))
    assert not same(expected[old], expected[new])
    assert {answer.status_code for answer in load.answers} == {200}
    seen = {version_of(answer, expected) for answer in load.answers}
    assert seen == {old, new}
    wait_until(lambda: queues(server, "swapped") == ["swapped #1"])
    folder.remove("swapped")


@pytest.mark.parametrize("broken", ["the file ends early", "the warm-up fails"])
def test_what_does_not_load_is_rolled_back(
    server: Running,
    folder: Folder,
    jpegs: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
) -> None:
    def fail(key: str, largest: int) -> None:
        raise CheckpointError("the trunk does not run: no memory")

    photo, name = jpegs["coffee"], "broken" + str(len(broken))
    folder.add(name, seed=3)
    old = wait_for(server, name, state="ready")
    before = scores(ask(server.client, name, photo))
    load = Load(server.url, lambda client: ask(client, name, photo))
    with load.running():
        if broken == "the warm-up fails":
            monkeypatch.setattr(server.backend.trunks.prober, "warm_up", fail)
        kept = 100_000 if broken == "the file ends early" else None
        folder.weights(name, seed=4, bytes_kept=kept)
        wait_until(lambda: bool(model(server, name).get("update_error")))
    described = model(server, name)
    assert (described["state"], described["model_digest"]) == ("ready", old["model_digest"])
    assert {answer.status_code for answer in load.answers} == {200}
    assert all(same(scores(answer), before) for answer in load.answers)
    assert server.metric("vitrail_catalog_failures") == 1
    assert server.client.get("/readyz").status_code == 200
    assert queues(server, name) == [name]
    monkeypatch.undo()
    folder.add(name, seed=5)
    wait_until(lambda: "update_error" not in model(server, name))
    assert model(server, name)["model_digest"] != old["model_digest"]
    assert server.metric("vitrail_catalog_failures") == 0
    assert server.metric("vitrail_catalog_updates_total", outcome="error") > 0
    folder.remove(name)


def test_a_default_model_that_was_removed_serves_until_the_new_one_is_ready(
    server: Running, folder: Folder, jpegs: dict[str, bytes]
) -> None:
    def send(client: httpx.Client) -> httpx.Response:
        return client.post("/classify", content=jpegs["coffee"])

    folder.add("elder", seed=10, file="chosen", more='[defaults]\nclassify = "elder"\n')
    wait_until(lambda: model(server, "elder").get("default_for") == ["classify"])
    assert send(server.client).json()["model"] == "elder"
    load = Load(server.url, send)
    with load.running():
        more = '[defaults]\nclassify = "younger"\n'
        folder.add("younger", seed=11, bytes_kept=100_000, file="chosen", more=more)
        wait_for(server, "younger", state="failed")
        wait_until(lambda: "update_error" in model(server, "elder"))
        assert "'younger' is ready" in model(server, "elder")["update_error"]
        load.wait(8)
        assert load.answers[-1].json()["model"] == "elder"
        folder.weights("younger", seed=11)
        wait_until(lambda: server.client.get("/models/elder").status_code == 404)
    assert {answer.status_code for answer in load.answers} == {200}
    assert send(server.client).json()["model"] == "younger"
    wait_until(lambda: server.metric("vitrail_catalog_failures") == 0)
    assert server.backend.registry.loaded_trunk("elder") is None
    assert "elder" not in server.backend.registry.catalog.trunks
    folder.remove("chosen")


def test_a_catalog_that_cannot_be_read_changes_nothing(
    server: Running, folder: Folder, jpegs: dict[str, bytes]
) -> None:
    folder.write("typo", '[trunks.typo]\nsauce = "file:typo.safetensors"\n')
    wait_until(lambda: "unknown sauce" in server.backend.watch.error)
    assert server.metric("vitrail_catalog_failures") == 1
    assert ask(server.client, "steady", jpegs["coffee"]).status_code == 200
    folder.remove("typo")
    wait_until(lambda: server.metric("vitrail_catalog_failures") == 0)


def test_heads_follow_their_trunk(
    server: Running,
    folder: Folder,
    tiny_catalog: Path,
    make: Any,  # noqa: F811
    jpegs: dict[str, bytes],
) -> None:
    """Of other weights they are failed, as after a restart, and with the old ones they are back."""
    photo, head = jpegs["coffee"], encode_head(make())
    folder.add("tiny")
    folder.copy(tiny_catalog.parent / "tiny.safetensors")
    wait_for(server, "tiny", state="ready")
    wait_until(lambda: upload(server, "pets", head, replace="true").is_success)
    assert ask(server.client, "pets", photo).status_code == 200
    folder.weights("tiny", seed=6)
    failed = wait_for(server, "pets", state="failed")
    assert "made for another trunk" in failed["reason"]
    assert ask(server.client, "pets", photo).status_code == 503
    folder.copy(tiny_catalog.parent / "tiny.safetensors")
    wait_for(server, "pets", state="ready")
    assert ask(server.client, "pets", photo).status_code == 200
    folder.remove("tiny")
    wait_until(lambda: server.client.get("/heads/pets").json().get("state") == "failed")
    assert "no trunk 'tiny'" in server.client.get("/heads/pets").json()["reason"]
    assert server.client.delete("/heads/pets").status_code == 204


def test_workers_agree_in_the_end(folder: Folder, jpegs: dict[str, bytes]) -> None:
    """Each looks at the catalog by itself; meanwhile the gateway asks those that have a model."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    backends = []
    for poll_s in (POLL_S, 10 * POLL_S):
        settings = Settings(catalog=str(folder.path), device="cpu", catalog_poll_s=poll_s)
        metrics = Metrics(CollectorRegistry())
        registry = Registry.from_catalog(settings.catalog, device="cpu")
        backends.append((LocalBackend(registry, settings.worker_options, metrics), metrics))
    with (
        serving_rpc(backends[0][0], settings, backends[0][1], addresses[0]),
        serving_rpc(backends[1][0], settings, backends[1][1], addresses[1]),
        gateway(settings, *addresses) as (url, client),
    ):
        wait_until(lambda: client.get("/readyz").status_code == 200)
        folder.add("shared", seed=7)
        wait_until(lambda: all(backend.knows("shared") for backend, _ in backends))

        def digests() -> set[str | None]:
            return {digest(backend, "shared") for backend, _ in backends}

        wait_until(lambda: len(digests()) == 1 and None not in digests())
        load = Load(url, lambda client: ask(client, "shared", jpegs["coffee"]))
        with load.running():
            for seed in (8, 9):
                old = digest(backends[0][0], "shared")
                folder.weights("shared", seed=seed)
                wait_until(lambda old=old: digests() != {old} and len(digests()) == 1)  # type: ignore[misc]
        assert {answer.status_code for answer in load.answers} == {200}
        folder.remove("shared")
        wait_until(lambda: client.get("/models/shared").status_code == 404)


def digest(backend: Any, name: str) -> str | None:
    found: str | None = backend.registry.describe(name).model_digest
    return found


def test_a_change_that_is_applied_may_hold_the_interpreter(
    server: Running, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a supervisor does not kill the workers meanwhile."""
    backend, seen = server.backend, []
    update = backend.registry.update

    def noting_update(*arguments: Any) -> None:
        seen.append(backend.health().loading)
        update(*arguments)

    monkeypatch.setattr(backend.registry, "update", noting_update)
    folder.add("held")
    wait_for(server, "held", state="ready")
    folder.remove("held")
    wait_until(lambda: not backend.knows("held"))
    assert seen == [True]
    wait_until(lambda: not backend.health().loading)


def test_the_loader_is_busy_until_its_thread_is_done() -> None:
    """Also if nobody waits for the result any more."""

    async def check() -> None:
        loader, end = Loader(torch.device("cpu")), threading.Event()
        assert not loader.busy
        task = asyncio.create_task(loader.run(end.wait))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert loader.busy
        end.set()
        await loader.run(lambda: None)
        assert not loader.busy
        loader.close()

    asyncio.run(check())


class Watched:
    """A watch of one file, whose models are not loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write("a", "b")
        self.registry = Registry(load_catalog(path), device="cpu")
        self.metrics = Metrics(CollectorRegistry())
        self.after: Callable[[], None] = lambda: None
        self.watch = CatalogWatch(
            self.registry,
            startup=(),
            interval_s=0,
            in_loader=self.in_loader,
            after=lambda: self.after(),
            on_change=lambda name: None,
            metrics=self.metrics,
        )

    def write(self, *names: str) -> None:
        models = "".join(f'[models.{n}]\ntrunk = "t"\ntask = "embed"\n' for n in names)
        trunk = '[trunks.t]\nsource = "file:t.safetensors"\n'
        partial = self.path.with_suffix(".partial")
        partial.write_text("startup = []\n" + trunk + models)
        partial.replace(self.path)

    async def in_loader(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    def until(self, condition: Callable[[], bool]) -> None:
        """Watch until then."""
        asyncio.run(self._until(condition))

    async def _until(self, condition: Callable[[], bool]) -> None:
        task = asyncio.create_task(self.watch.run())
        async with asyncio.timeout(30):
            while not condition() and not task.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert not task.done()
        task.cancel()

    def names(self) -> set[str]:
        return set(self.registry.names())


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "catalog.toml")


def test_no_error_of_reading_ends_the_watch(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(location: str) -> None:
        raise RuntimeError("not foreseen")

    monkeypatch.setattr(catalog_watch, "load_catalog", fail)
    watched.until(lambda: watched.watch.error == "not foreseen")
    monkeypatch.undo()
    watched.write("a", "b", "c")
    watched.until(lambda: "c" in watched.names())
    watched.until(lambda: watched.watch.error == "")


def test_a_change_that_breaks_is_seen_and_tried_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("not foreseen")

    watched.after = fail
    watched.write("a", "b", "c")
    watched.until(lambda: "not foreseen" in watched.watch.error)
    looks: list[None] = []
    monkeypatch.setattr(watched.watch, "_read", noting(watched.watch._read, looks))
    watched.until(lambda: len(looks) > 2)
    assert "not foreseen" in watched.watch.error  # also after looks that find the same
    updates = watched.metrics.catalog_updates
    assert updates.labels("error")._value.get() == 1
    watched.after = lambda: None
    monkeypatch.setattr(catalog_watch, "RETRY_S", 0.0)
    watched.until(lambda: watched.watch.error == "")
    assert updates.labels("ok")._value.get() == 1
    assert not watched.watch.applying


def test_a_removal_that_fails_is_tried_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise UnavailableError("not now")

    monkeypatch.setattr(watched.registry, "remove", fail)
    watched.write("a")
    watched.until(lambda: watched.watch.failures == {"b": "not now"})
    monkeypatch.undo()
    monkeypatch.setattr(catalog_watch, "RETRY_S", 0.0)
    watched.until(lambda: watched.watch.failures == {})
    assert watched.names() == {"a"}


def noting(function: Callable[[], Any], calls: list[None]) -> Callable[[], Any]:
    def noted() -> Any:
        calls.append(None)
        return function()

    return noted
