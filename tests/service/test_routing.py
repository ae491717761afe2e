"""Which worker is chosen, among many that exist only here."""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from models.description import ModelDescription, State
from service.errors import NotFoundError, UnavailableError
from service.remote.backend import RemoteBackend
from service.remote.descriptions import differences
from service.remote.metrics import RemoteMetrics
from service.remote.models import WorkerModels
from service.remote.routing import SAMPLE, Router
from service.remote.versions import Versions
from service.remote.worker import Worker
from service.remote.workers import Workers
from service.settings import Settings
from service.tls import WorkerCredentials
from service.types import Call, Health, InferRequest, InferResult, ModelUsed
from service.versions import of_one_version

NOBODY = frozenset[Worker]()


def described(name: str, digest: str) -> ModelDescription:
    """A ready model."""
    return ModelDescription(
        name=name, task="embed", tasks=("embed",), default_for=(), trunk="t", state=State.READY,
        source="", device="cpu", dtype="float32", licence="", description="", model_digest=digest,
    )  # fmt: skip


class Known:
    """A worker, as a gateway knows it."""

    asked = 0
    address = ""

    def __init__(
        self, *models: str, outstanding: int = 0, up: bool = True, version: str = "1"
    ) -> None:
        self.models = {name: described(name, version) for name in models}
        self.outstanding = outstanding
        self.up = up
        self.ejected = False
        self.health = Health(live=True, ready=True)
        self.known = WorkerModels()

    def has_ready(self, model: str) -> bool:
        Known.asked += 1
        return self.up and model in self.models and self.models[model].state == State.READY

    def would_load(self, model: str) -> bool:
        return Worker.would_load(cast(Worker, self), model)

    def has_version(self, model: str, digest: str | None) -> bool:
        return self.has_ready(model) and self.models[model].model_digest == digest

    async def infer(self, request: InferRequest) -> InferResult:
        return InferResult([ModelUsed(str(c.model), "", "", "") for c in request.calls], [])


class Fleet(list[Known]):
    """Workers by model."""

    def __init__(self, workers: Iterable[Known]) -> None:
        super().__init__(workers)
        self.versions = Versions(cast(Callable[[str], Sequence[Worker]], self.having))

    def having(self, model: str) -> Sequence[Known]:
        return [worker for worker in self if model in worker.models]

    def describe(self, model: str) -> Any:
        return None

    def some_names(self) -> list[str]:
        return ["some"]

    def default_model(self, task: str) -> str | None:
        return next((name for worker in self for name in worker.models), None)


def choose(
    fleet: Fleet, *models: str, avoid: Sequence[Known] = (), changed: bool = True
) -> list[tuple[Any, list[int]]]:
    if changed:
        fleet.versions.note_worker()
    router = Router(cast(Workers, fleet))
    chosen: list[tuple[Any, list[int]]] = []
    chosen += router._choose(models, frozenset(cast(Sequence[Worker], avoid)))
    return chosen


def test_the_least_busy_worker_that_has_the_model_is_chosen() -> None:
    fleet = Fleet([Known("a", outstanding=2), Known("a", outstanding=1), Known("b")])
    assert choose(fleet, "a") == [(fleet[1], [0])]
    assert choose(fleet, "a", avoid=[fleet[1]]) == [(fleet[0], [0])]


def test_a_model_that_none_has_ready_is_loaded_by_one_worker() -> None:
    fleet = Fleet(Known("a", "b") for _ in range(8))
    for number, worker in enumerate(fleet):
        worker.address = f"worker-{number}:8001"
        unloaded = replace(worker.models["a"], state=State.UNLOADED, model_digest=None)
        worker.models["a"] = replace(unloaded, on_demand=True)
    [(first, _)] = choose(fleet, "a")
    others = Fleet(reversed(fleet))  # as another gateway knows them
    assert {choose(others, "a")[0][0] for _ in range(20)} == {first}
    assert sorted(i for _, places in choose(fleet, "a", "b") for i in places) == [0, 1]
    assert choose(fleet, "a", avoid=[first])[0][0] is not first
    first.up = False
    [(second, _)] = choose(fleet, "a")
    assert second is not first
    second.models["a"] = described("a", "1")
    first.up = True
    assert choose(fleet, "a") == [(second, [0])]
    for worker in fleet:
        worker.models["a"] = unloaded  # by an admin
    with pytest.raises(NotFoundError):
        choose(fleet, "a")


def test_a_request_goes_to_the_fewest_workers() -> None:
    fleet = Fleet([Known("a"), Known("b"), Known("a", "b", outstanding=9), Known("c")])
    assert choose(fleet, "a", "b") == [(fleet[2], [0, 1])]
    assert choose(fleet, "b", "c", "a") == [(fleet[2], [0, 2]), (fleet[3], [1])]


def test_a_choice_among_many_asks_few() -> None:
    fleet = Fleet(Known("a", outstanding=number) for number in range(1000))
    Known.asked = 0
    chosen = {choose(fleet, "a", changed=False)[0][0].outstanding for _ in range(50)}
    assert Known.asked <= len(fleet) + 50 * 3 * SAMPLE  # versions are counted once
    assert max(chosen) < 900  # the least busy of 16, each time others
    assert len(chosen) > 10


def test_the_only_good_worker_of_many_is_found() -> None:
    fleet = Fleet(Known("a", up=False) for _ in range(200))
    for worker in fleet[:100]:
        worker.up, worker.health = True, Health(live=True, ready=True, draining=True)
    fleet[150].up, fleet[150].outstanding = True, 99
    assert choose(fleet, "a") == [(fleet[150], [0])]
    fleet[150].up = False
    [(chosen, _)] = choose(fleet, "a")
    assert chosen.health.draining  # rather than an error


def test_a_model_is_answered_in_the_version_that_most_workers_have() -> None:
    fleet = Fleet([*(Known("a", "b", outstanding=9) for _ in range(2)), Known("a", version="2")])
    assert choose(fleet, "a")[0][0] in fleet[:2]
    fleet[0].models = fleet[2].models
    assert choose(fleet, "a")[0][0] is fleet[2]
    assert choose(fleet, "a", "b") == [(fleet[2], [0]), (fleet[1], [1])]
    fleet[2].up = False
    first = choose(fleet, "a")[0][0]
    assert all(choose(fleet, "a")[0][0] is first for _ in range(20))  # also where as many have both
    first.health = Health(live=True, ready=True, draining=True)
    assert choose(fleet, "a")[0][0] not in (first, fleet[2])


def test_among_many_the_version_of_most_answers_every_request() -> None:
    random.seed(0)
    few = [Known("a", outstanding=0, version="2") for _ in range(45)]
    fleet = Fleet([*few, *(Known("a", outstanding=9) for _ in range(55))])
    assert {choose(fleet, "a")[0][0].models["a"].model_digest for _ in range(50)} == {"1"}


def test_a_failing_worker_does_not_change_the_version_unless_all_of_it_fail() -> None:
    fleet = Fleet([Known("a"), Known("a"), Known("a", version="2")])
    fleet[0].ejected = True
    assert choose(fleet, "a") == [(fleet[1], [0])]
    fleet[1].ejected = True
    assert choose(fleet, "a", changed=False) == [(fleet[2], [0])]
    fleet[2].ejected = True
    assert choose(fleet, "a", changed=False)[0][0] in fleet[:2]


class Gateway:
    """A backend over workers that exist only here."""

    def __init__(self, *workers: Known) -> None:
        self.backend = RemoteBackend(Settings(), RemoteMetrics(CollectorRegistry()))
        self.workers = self.backend._workers
        for number, worker in enumerate(workers):
            worker.address = f"w{number}"
            self.workers._by_address[worker.address] = cast(Worker, worker)
            self.note(worker)

    def note(self, worker: Known) -> None:
        for name in ("a", "b"):
            self.workers._note_change(worker.address, name)


def test_a_gateway_describes_the_version_that_answers_and_names_the_workers_left_out() -> None:
    workers = Known("a", "b", version="2"), Known("a", "b"), Known("a", "b")
    workers[0].models["b"] = workers[1].models["b"]
    gateway = Gateway(*workers)

    def digest() -> str | None:
        return asyncio.run(gateway.backend.model("a")).model_digest

    assert digest() == "1"
    health = gateway.backend.health()
    assert (health.ready, health.reasons) == (
        True, ["worker w0: model a is in another version here"],
    )  # fmt: skip
    assert [known["reasons"] for known in gateway.backend.state()["workers"].values()] == [
        ["model a is in another version here"], [], [],
    ]  # fmt: skip

    workers[1].up = workers[2].up = False
    seen = gateway.workers.changes.since("").version
    gateway.workers._note_state()
    assert digest() == "2"
    assert gateway.workers.changes.since(seen).names == ["a"]  # for those who follow it

    workers[1].up = workers[2].up = True
    workers[1].models = workers[2].models = workers[0].models
    gateway.note(workers[1])
    gateway.note(workers[2])
    assert gateway.backend.health().reasons == []
    workers[1].models = {"a": described("a", "3")}
    gateway.note(workers[1])
    assert gateway.backend.health().reasons == ["worker w1: model a is in another version here"]


def test_a_worker_with_many_other_versions_is_described_in_short() -> None:
    assert differences([str(number) for number in range(9)])[4:] == [
        "model 4 is in another version here", "4 more models are in another version here",
    ]  # fmt: skip


def test_a_worker_says_when_it_is_lost_or_drains() -> None:
    async def noted() -> list[tuple[bool, bool]]:
        seen: list[tuple[bool, bool]] = []
        settings = Settings()
        worker = Worker(
            "127.0.0.1:1", settings, RemoteMetrics(CollectorRegistry()),
            WorkerCredentials(settings), lambda name: None,
            lambda: seen.append((worker.up, worker.health.draining)),
        )  # fmt: skip
        for draining in (False, False, True):
            worker.health = Health(live=True, ready=True, draining=draining)
            worker._set_up(True)
        worker._lose("gone")
        await worker.close()
        return seen

    assert asyncio.run(noted()) == [(True, False), (True, True), (False, True)]


def test_parts_of_a_request_are_sent_again_if_a_model_changed_between_them() -> None:
    def result(digest: str) -> InferResult:
        return InferResult([ModelUsed("a", "embed", digest, "")], [])

    async def ask(*digests: str) -> Sequence[InferResult]:
        rest = iter(digests)

        async def send() -> Sequence[InferResult]:
            return [result(next(rest)) for _ in range(2)]

        return await of_one_version(send)

    assert asyncio.run(ask("1", "2", "2", "2")) == [result("2")] * 2
    with pytest.raises(UnavailableError, match="changed"):
        asyncio.run(ask("1", "2", "2", "3"))


def test_an_unknown_model_is_an_error() -> None:
    with pytest.raises(NotFoundError, match="some"):
        choose(Fleet([Known("a")]), "b")
    with pytest.raises((NotFoundError, UnavailableError)):
        choose(Fleet([Known("a", up=False)]), "a")


def ask_for_default(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, probe: Callable[[], None], within_s: float
) -> str:
    """The model that answers a request without one; `probe` is called whenever it waits."""

    async def sleep(_: float) -> None:
        probe()

    async def ask() -> InferResult:
        backend = RemoteBackend(Settings(), RemoteMetrics(CollectorRegistry()))
        backend._router = Router(cast(Workers, fleet))
        calls, deadline = [Call(model=None, task="classify")], time.monotonic() + within_s
        return await backend.infer(InferRequest(inputs=[], calls=calls, deadline=deadline))

    monkeypatch.setattr("service.remote.routing.asyncio", SimpleNamespace(sleep=sleep))
    return asyncio.run(ask()).models[0].name


def test_a_request_for_the_default_model_waits_until_a_worker_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As at a gateway that has just started."""
    fleet = Fleet([Known(up=False), Known(up=False)])

    def probe() -> None:
        fleet[1] = Known("a")

    assert ask_for_default(fleet, monkeypatch, probe, 60) == "a"


@pytest.mark.parametrize(("up", "within_s"), [(False, 0), (True, 60)])
def test_a_request_for_the_default_model_does_not_wait_in_vain(
    up: bool, within_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither beyond its deadline nor where every worker has said that it has no model."""

    def probe() -> None:
        pytest.fail("it waits")

    with pytest.raises(UnavailableError, match="no worker"):
        ask_for_default(Fleet([Known(up=up)]), monkeypatch, probe, within_s)
