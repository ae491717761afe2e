"""Models that are loaded when a request asks for them, within a memory budget."""

import asyncio
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

from models.catalog import load_catalog
from models.checkpoints.checkpoint import HeadState
from models.description import State
from models.errors import CheckpointError, ModelNotFoundError
from models.heads.files import HeadFile, encode_head
from models.model import Model
from models.registry import Registry
from service.errors import DeadlineExceededError, QueueFullError, UnavailableError
from service.ray.groups import multiplexed, trunk_groups
from service.types import Call
from service.worker import model_loads, on_demand
from service.worker.loader import Loader
from service.worker.memory_budget import MemoryBudget
from service.worker.model_loads import ModelLoads
from service.worker.on_demand import OnDemand
from tests.conftest import Running, running, wait_until

# Two trunks of 1.5 MB fit into 4 MiB, three do not.
BUDGET_MB = 4


@pytest.fixture(scope="module")
def catalog(tiny_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trunks with a model each, of which one is loaded at start."""
    path = tmp_path_factory.mktemp("on-demand") / "catalog.toml"
    weights = tiny_catalog.with_name("tiny.safetensors")
    tables = [
        f'[trunks.{name}]\nsource = "file:{weights}"\narchitecture = "test_vit"\n'
        f'[models.{name}]\ntrunk = "{name}"\ntask = "classify"\n'
        for name in ("first", "second", "third")
    ]
    path.write_text('startup = ["first"]\n' + "".join(tables))
    return path


@pytest.fixture(scope="module")
def server(catalog: Path) -> Iterator[Running]:
    with running(catalog, model_memory_mb=BUDGET_MB) as started:
        started.wait_ready()
        yield started


def states(server: Running) -> dict[str, str]:
    return {
        model["name"]: model["state"] for model in server.client.get("/models").json()["models"]
    }


def test_what_was_asked_for_least_recently_makes_room(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    def ask(model: str) -> int:
        return server.client.post(f"/classify?model={model}", content=jpegs["coffee"]).status_code

    assert states(server) == {"first": "ready", "second": "unloaded", "third": "unloaded"}
    assert ask("second") == 200
    assert states(server) == {"first": "ready", "second": "ready", "third": "unloaded"}
    assert ask("third") == 200
    assert states(server) == {"first": "ready", "second": "unloaded", "third": "ready"}
    assert ask("none") == 404
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, ["second", "third", "first"] * 8))
    assert answers == [200] * 24


def test_models_that_do_not_fit_together_are_refused(
    server: Running, jpegs: dict[str, bytes]
) -> None:
    models = {"models": ["first", "second", "third"]}
    answer = server.client.post("/predict", params=models, content=jpegs["coffee"])
    assert answer.status_code == 503
    assert "do not fit into 4 MiB together" in answer.json()["detail"]


def test_a_load_past_the_deadline_goes_on(server: Running, jpegs: dict[str, bytes]) -> None:
    def ask(**headers: str) -> int:
        url = "/classify?model=second"
        return server.client.post(url, content=jpegs["coffee"], headers=headers).status_code

    server.backend.registry.unload("second")
    assert ask(**{"X-Timeout-Ms": "1"}) == 504
    assert ask() == 200


def test_a_gateways_workers_load_on_demand(catalog: Path, jpegs: dict[str, bytes]) -> None:
    with running(catalog, apart=True, model_memory_mb=BUDGET_MB) as server:
        server.wait_ready()
        for model in ("second", "third", "second", "first"):
            answer = server.client.post(f"/classify?model={model}", content=jpegs["coffee"])
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == model
        models = {"models": ["first", "second"]}
        answer = server.client.post("/predict", params=models, content=jpegs["coffee"])
        assert answer.json()["results"][0]["outputs"].keys() == {"first", "second"}


def test_on_ray_what_is_loaded_on_demand_shares_a_group(catalog: Path) -> None:
    groups = trunk_groups(load_catalog(catalog))
    assert [group.name for group in groups] == ["first", "second", "third"]
    kept, shared = multiplexed(groups, ["first"])
    assert (kept.models, shared.models) == (["first"], ["second", "third"])
    assert shared.trunks == {"second", "third"}
    assert multiplexed(groups, ["first", "second", "third"]) == groups


def test_heads_come_back_with_their_trunk(server: Running, jpegs: dict[str, bytes]) -> None:
    def ask(model: str) -> int:
        return server.client.post(f"/classify?model={model}", content=jpegs["coffee"]).status_code

    for name in ("second", "third"):
        server.backend.registry.unload(name)
    assert ask("second") == 200
    trunk = server.backend.registry.load_trunk("second").trunk
    depth, dim = len(trunk.blocks), trunk.blocks[0].attn.qkv.in_features
    weights = {
        "queries": torch.zeros(depth, 1, dim),
        "classifier.0.weight": torch.zeros(2, dim * (1 + depth)),
        "classifier.0.bias": torch.zeros(2),
    }
    head = HeadFile(
        kind="vqt",
        trunk="second",
        trunk_digest=trunk.digest,
        preprocess_digest=trunk.preprocess.digest,
        labels=("cat", "dog"),
        state=HeadState(weights),
    )
    fields = {"name": "pets"}
    assert ask("third") == 200  # the upload brings its trunk back
    answer = server.client.post("/heads", files={"file": encode_head(head)}, data=fields)
    assert answer.status_code == 201, answer.text
    assert server.backend.trunks.head_bytes("second") > sum(t.nbytes for t in weights.values())
    assert ask("third") == 200
    assert (states(server)["second"], states(server)["pets"]) == ("unloaded", "unloaded")
    assert ask("second") == 200
    wait_until(lambda: states(server)["pets"] == "ready")
    assert server.client.delete("/heads/pets").status_code == 204


class Loading:
    """Six trunks, of which two fit, loaded on demand without a server."""

    def __init__(self, weights: Path) -> None:
        tables = [
            f'[trunks.{name}]\nsource = "file:{weights}"\narchitecture = "test_vit"\n'
            f'[models.{name}]\ntrunk = "{name}"\ntask = "classify"\n'
            f'[models.{name}-again]\ntrunk = "{name}"\ntask = "classify"\n'
            for name in "abcdef"
        ]
        path = weights.with_name("catalog.toml")
        path.write_text("startup = []\n" + "".join(tables))
        self.weights = weights
        self.registry = Registry.from_catalog(path, device="cpu", on_load=self._note)
        self.loader = Loader(self.registry.device)
        self.startup: list[str] = []
        self.fits: set[str] = set()
        self.most = 0
        self.on_demand = OnDemand(
            self.registry,
            BUDGET_MB,
            startup=lambda: self.startup,
            fitted_on=lambda: self.fits,
            head_bytes=lambda trunk: 0,
            in_loader=self.loader.run,
            load=self._load,
            unload=self._unload,
        )

    def _load(self, name: str) -> None:
        self.registry.load(name)

    def _unload(self, names: Sequence[str]) -> None:
        for name in names:
            self.registry.unload(name)

    def _note(self, model: Model) -> None:
        self.most = max(self.most, len(self.loaded) + 1)

    @property
    def loaded(self) -> set[str]:
        return {n for n in self.registry.names() if self.registry.state(n) is State.READY}

    @asynccontextmanager
    async def using(self, *names: str, seconds: float = 60) -> AsyncIterator[None]:
        """As a request for models that runs within the context."""
        calls = [Call(name, None) for name in names]
        async with self.on_demand.loaded(calls, time.monotonic() + seconds):
            yield

    async def use(self, *names: str, seconds: float = 60) -> None:
        async with self.using(*names, seconds=seconds):
            assert self.loaded.issuperset(names)

    async def fail(self, name: str) -> None:
        """Have a model fail to load."""
        weights = self.weights.read_bytes()
        self.weights.unlink()
        with pytest.raises(UnavailableError):
            await self.use(name)
        self.weights.write_bytes(weights)


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test on an event loop, on which those who wait are served."""

    async def serve(loading: Loading, **fixtures: Any) -> None:
        serving = asyncio.create_task(loading.on_demand.run())
        await test(loading=loading, **fixtures)
        serving.cancel()
        await asyncio.wait([serving])

    @wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(serve(**fixtures))

    return run


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition)


@pytest.fixture
def loading(tiny_catalog: Path, tmp_path: Path) -> Iterator[Loading]:
    made = Loading(Path(shutil.copy(tiny_catalog.with_name("tiny.safetensors"), tmp_path)))
    yield made
    made.loader.close()


@on_a_loop
async def test_room_is_made_before_each_load(loading: Loading) -> None:
    await asyncio.gather(*map(loading.use, "abcdef" * 3))
    assert loading.most == 2
    assert not loading.on_demand._memory.in_use


@on_a_loop
async def test_requests_for_a_trunk_that_makes_room_wait_for_their_turn(loading: Loading) -> None:
    end, order = asyncio.Event(), list[str]()

    async def hold(name: str) -> None:
        async with loading.using(name):
            await end.wait()

    async def ask(name: str) -> None:
        async with loading.using(name):
            order.append(name)

    holding = [asyncio.create_task(hold(name)) for name in "ab"]
    await until(lambda: loading.loaded == {"a", "b"})
    with pytest.raises(DeadlineExceededError, match="waited for memory or was loading: 'd'"):
        await loading.use("d", seconds=0.05)
    asking = [asyncio.create_task(ask("c"))]
    await until(lambda: loading.on_demand._memory.leaving == "a")
    asking.append(asyncio.create_task(ask("a")))
    await loading.use("b")  # it stays
    end.set()
    await asyncio.gather(*holding, *asking)
    assert order == ["c", "a"]
    assert loading.most == 2


@on_a_loop
async def test_who_is_cancelled_while_waiting_holds_nothing(loading: Loading) -> None:
    go = threading.Event()
    blocking = asyncio.create_task(loading.loader.run(go.wait))
    waiting = [asyncio.create_task(loading.use(name)) for name in "abc"]
    await until(lambda: len(loading.on_demand._queue) == 3)
    for task in waiting[1:]:
        task.cancel()
    go.set()
    await asyncio.gather(blocking, *waiting, return_exceptions=True)
    await loading.use("d")
    assert loading.loaded == {"a", "d"}
    assert not loading.on_demand._memory.in_use


@on_a_loop
async def test_memory_beyond_the_budget_is_given_back(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_demand, "INTERVAL_S", 0.01)
    for name in "abc":
        loading.registry.load(name)
    async with loading.using("b"):
        await until(lambda: len(loading.loaded) == 2)
        assert "b" in loading.loaded


@on_a_loop
async def test_a_trunk_that_a_head_is_fitted_on_stays(loading: Loading) -> None:
    loading.fits = {"a"}
    await loading.use("a")
    for name in "bcd":
        await loading.use(name)
    assert loading.loaded == {"a", "d"}
    loading.fits = {"a", "d"}
    await loading.use("b")  # one may exceed the budget
    loading.fits = {"a", "b", "d"}
    with pytest.raises(UnavailableError, match="no room") as refused:
        await loading.use("c")
    assert refused.value.retry_after_s


@on_a_loop
async def test_the_trunk_of_a_fit_is_loaded_after_a_restart(loading: Loading) -> None:
    loading.fits = {"b"}
    await until(lambda: "b" in loading.loaded)


@on_a_loop
async def test_what_failed_is_loaded_once_it_can_be(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = loading.weights.read_bytes()
    loading.weights.unlink()
    for _ in range(2):  # the second time it is not tried
        with pytest.raises(UnavailableError) as failed:
            await loading.use("a")
        assert 0 < (failed.value.retry_after_s or 0) <= model_loads.RETRY_S
        loading.weights.write_bytes(weights)
    monkeypatch.setattr(model_loads, "RETRY_S", 0)
    await loading.use("a")


@on_a_loop
async def test_few_models_wait_and_none_is_loaded_that_nobody_waits_for(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_demand, "MAX_WAITING", 4)
    go = threading.Event()
    blocking = asyncio.create_task(loading.loader.run(go.wait))
    waiting = [asyncio.create_task(loading.use(name)) for name in "abc"]
    with pytest.raises(DeadlineExceededError):
        await loading.use("d", seconds=0.05)
    with pytest.raises(QueueFullError, match="4 other models wait"):
        await loading.use("e")
    go.set()
    await asyncio.gather(blocking, *waiting)
    await loading.use("f")  # after what was asked for before
    assert loading.registry.state("d") is State.UNLOADED
    assert loading.registry.describe("d").load_seconds is None


@on_a_loop
async def test_what_an_admin_unloaded_stays_so(loading: Loading) -> None:
    await loading.use("a")
    loading.on_demand.stop("a")
    loading.registry.unload("a")
    async with loading.using("a"):
        assert loading.registry.state("a") is State.UNLOADED
    assert not loading.on_demand.loads("a")
    await loading.on_demand.load("a")
    assert loading.loaded == {"a"}
    assert loading.on_demand.loads("a")


@on_a_loop
async def test_what_was_never_asked_for_makes_room_first(loading: Loading) -> None:
    await loading.use("a")
    loading.registry.load("b")
    await loading.use("c")
    assert loading.loaded == {"a", "c"}


@on_a_loop
async def test_a_default_does_not_depend_on_what_others_load(loading: Loading) -> None:
    await loading.use("a")
    with pytest.raises(ModelNotFoundError):  # its only default would be what happens to be loaded
        loading.registry.default_model("embed")
    assert loading.registry.default_model("classify").name == "a"


@on_a_loop
async def test_start_up_models_that_do_not_fit_are_told(
    loading: Loading, caplog: pytest.LogCaptureFixture
) -> None:
    loading.startup = list("abc")
    for name in loading.startup:
        loading.registry.load(name)
    loading.on_demand._memory.check_startup()
    assert "more than VITRAIL_MODEL_MEMORY_MB" in caplog.text
    await loading.use("d")
    await loading.use("e")
    assert loading.loaded == {"a", "b", "c", "e"}


@on_a_loop
async def test_one_attempt_to_load_a_model_serves_all_who_ask_for_it(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = list[str]()

    def fail(name: str) -> None:
        attempts.append(name)
        loading.registry.load(name)

    def refuse(model: Model) -> None:
        raise CheckpointError("it does not fit")

    await loading.use("a")
    loading.registry.on_load = refuse
    monkeypatch.setattr(loading.on_demand._models, "_load", fail)
    asking = (loading.use("a-again") for _ in range(20))
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(answer) for answer in answers] == [UnavailableError] * 20
    assert attempts == ["a-again"]


@on_a_loop
async def test_an_upload_needs_any_model_on_its_trunk(loading: Loading) -> None:
    await loading.fail("a")
    async with loading.on_demand.trunk_loaded(lambda: "a"):
        assert loading.loaded == {"a-again"}
    loading.registry.load("b-again")
    async with loading.on_demand.trunk_loaded(lambda: "b"):
        assert loading.loaded == {"a-again", "b-again"}


@on_a_loop
async def test_no_room_is_made_for_the_trunk_of_a_fit_that_has_just_failed(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    await loading.fail("c")
    await loading.fail("c-again")
    await loading.use("a", "b")
    loading.fits = {"c"}
    await loading.on_demand._load_for_fits()
    assert loading.loaded == {"a", "b"}


@on_a_loop
async def test_others_are_served_at_once_after_an_error(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next round is not after an interval that never ends."""
    monkeypatch.setattr(on_demand, "INTERVAL_S", 10_000)
    correct, errors = loading.on_demand._memory.correct, [OSError()]

    async def fail_once(trunks: frozenset[str]) -> None:
        if errors:
            raise errors.pop()
        await correct(trunks)

    monkeypatch.setattr(loading.on_demand._memory, "correct", fail_once)
    await asyncio.gather(loading.use("a", seconds=30), loading.use("b", seconds=30))
    assert not errors


def test_who_waits_when_the_server_stops_is_told(loading: Loading) -> None:
    async def stop() -> None:
        serving = asyncio.create_task(loading.on_demand.run())
        await loading.use("d")
        go = threading.Event()
        blocking = asyncio.create_task(loading.loader.run(go.wait))
        waiting = [asyncio.create_task(loading.use(name)) for name in "ab"]
        await until(lambda: len(loading.loader._unfinished) == 2)  # "a" is being served
        assert len(loading.on_demand._queue) == 2
        serving.cancel()
        await asyncio.wait([serving])
        go.set()
        waiting.append(asyncio.create_task(loading.use("c")))
        for task in waiting:
            with pytest.raises(UnavailableError, match="stopping"):
                await asyncio.wait_for(task, 30)
        await blocking

    asyncio.run(stop())


def test_without_a_budget_no_upload_is_read(loading: Loading) -> None:
    async def upload() -> None:
        made = OnDemand(
            loading.registry, 0, startup=list, fitted_on=set, head_bytes=lambda trunk: 0,
            in_loader=loading.loader.run, load=loading._load, unload=loading._unload,
        )  # fmt: skip
        async with made.trunk_loaded(lambda: pytest.fail("it is read")):
            pass

    asyncio.run(upload())


def clip_budget(
    clip: tuple[Path, Any], loader: Loader, fits: set[str]
) -> tuple[Registry, MemoryBudget]:
    """A loaded CLIP, for which there is no room."""
    registry = Registry.from_catalog(clip[0], device="cpu")
    registry.load("clip")

    def unload(names: Sequence[str]) -> None:
        for name in names:
            registry.unload(name)

    return registry, MemoryBudget(
        registry, 0, startup=list, fitted_on=lambda: fits, head_bytes=lambda trunk: 0,
        in_loader=loader.run, unload=unload,
    )  # fmt: skip


def test_a_tower_of_a_clip_stays_while_a_head_is_fitted_on_the_other(
    loading: Loading, clip: tuple[Path, Any]
) -> None:
    fits = {"clip-image"}
    registry, memory = clip_budget(clip, loading.loader, fits)
    asyncio.run(memory.tidy())
    memory._evict("clip-text")  # as if the fit had begun since it was chosen
    assert registry.loaded_trunk("clip-image")
    fits.clear()
    asyncio.run(memory.tidy())
    assert not registry.loaded_trunk("clip-image")


def test_an_upload_needs_no_more_trunks_than_its_own(
    loading: Loading, clip: tuple[Path, Any]
) -> None:
    registry, memory = clip_budget(clip, loading.loader, set())
    loads = ModelLoads(registry, memory, loading.loader.run, loading._load)
    found = loads.first_on("clip-image")
    assert found
    assert found.name == "clip"  # it is loaded
    registry.unload("clip")
    found = loads.first_on("clip-image")
    assert found
    assert found.trunks == ("clip-image",)


def test_sizes_are_counted_again_only_once_a_trunk_can_go(
    loading: Loading, clip: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, memory = clip_budget(clip, loading.loader, set())
    counts = list[Iterable[str]]()
    total = memory._sizes.total

    def count(trunks: Iterable[str]) -> int:
        counts.append(trunks)
        return total(trunks)

    monkeypatch.setattr(memory._sizes, "total", count)

    async def use() -> None:
        for trunks in (["clip-image", "clip-text"], ["clip-text"], ["other"]):
            memory.use(trunks)
        leaving = asyncio.create_task(memory.correct(frozenset()))
        for trunks in ([], ["clip-text"], ["other"]):
            memory.release(trunks)
            await asyncio.sleep(0)
        assert len(counts) == 1
        memory.release(["clip-image", "clip-text"])
        await leaving

    asyncio.run(use())
