"""What has changed in a registry: told once, and nothing where nothing has."""

import asyncio
import json
import random

import pytest

from models.description import ModelDescription
from service import changes
from service.changes import ChangeLog, Difference
from service.remote.following import Follower
from service.remote.models import WorkerModels
from service.stubs import vision_pb2 as pb


def names(log: ChangeLog, version: str = "") -> list[str]:
    return log.since(version).names


def test_a_change_is_told_once() -> None:
    log = ChangeLog()
    for name in ("a", "b", "c"):
        log.touch(name)
    first = log.since("")
    assert (first.names, first.reset, first.more) == (["a", "b", "c"], True, False)
    assert log.since(first.version) == Difference(first.version, [])
    log.touch("b")
    log.touch("a", removed=True)
    log.touch("b")
    second = log.since(first.version)
    assert (second.names, second.reset) == (["a", "b"], False)
    assert log.since(second.version).names == []
    assert names(log) == ["b", "c"]


def test_everything_comes_in_parts_in_the_order_of_the_catalog() -> None:
    log = ChangeLog()
    for number in range(10):
        log.touch(str(number))
    log.touch("0")
    part = log.since("", limit=4)
    found, parts = part.names, 1
    log.touch("2")
    while part.more:
        part = log.since(part.version, limit=4)
        assert not part.reset
        found, parts = found + part.names, parts + 1
    assert (found, parts) == ([str(number) for number in range(10)], 3)
    assert names(log, part.version) == ["2"]  # it changed meanwhile


@pytest.mark.parametrize("version", ["x", "other.3", "{epoch}", "{epoch}.x", "{epoch}.1.2.3"])
def test_an_unknown_version_gets_everything(version: str) -> None:
    log = ChangeLog()
    log.touch("a")
    answer = log.since(version.format(epoch=log._epoch))
    assert (answer.names, answer.reset) == (["a"], True)


def test_a_log_is_bounded_by_the_names_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "SPARE", 8)
    log = ChangeLog()
    log.touch("stays")
    old = log.since("").version
    for number in range(1000):
        log.touch(str(number))
        log.touch(str(number), removed=True)
    assert len(log._log) <= 2 + 8 + 1
    assert len(log._latest) <= 8 + 1
    answer = log.since(old)
    assert (answer.names, answer.reset) == (["stays"], True)


def described(name: str, **members: object) -> ModelDescription:
    return ModelDescription.from_json(
        {"name": name, "task": "classify", "tasks": ["classify"], "default_for": [],
         "trunk": "t", "state": "ready", "source": "", "device": "cpu", "dtype": "float32",
         "licence": "", "description": "", **members}
    )  # fmt: skip


def test_a_follower_has_what_the_log_has_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "SPARE", 8)
    chance = random.Random(0)
    log, truth = ChangeLog(), dict[str, ModelDescription]()
    known, version = WorkerModels(), ""
    for _ in range(2000):
        name = str(chance.randrange(40))
        if name in truth and chance.random() < 0.4:
            del truth[name]
            log.touch(name, removed=True)
        else:
            state, trunk = chance.choice(["ready", "loading"]), chance.choice("tuv")
            truth[name] = described(name, state=state, trunk=trunk, startup=chance.random() < 0.5)
            log.touch(name)
        if chance.random() < 0.2:
            part = log.since(version, limit=3)
            if part.reset:
                known = WorkerModels()
            known.apply(
                [truth[name] for name in part.names if name in truth],
                [name for name in part.names if name not in truth],
            )
            version = part.version
    more = True
    while more:
        part = log.since(version, limit=3)
        if part.reset:
            known = WorkerModels()
        known.apply(
            [truth[name] for name in part.names if name in truth],
            [name for name in part.names if name not in truth],
        )
        version, more = part.version, part.more
    assert known.by_name == truth
    assert known.startup.keys() == {name for name, model in truth.items() if model.startup}
    ready = [model.trunk for model in truth.values() if model.is_ready]
    assert known.trunks == {trunk: ready.count(trunk) for trunk in set(ready)}


def test_the_default_of_a_task_moves_in_any_order() -> None:
    known = WorkerModels()
    known.apply([described("a", default_for=["classify"])], [])
    known.apply([described("b", default_for=["classify"]), described("a")], [])
    assert known.defaults == {"classify": "b"}
    known.apply([described("a", default_for=["classify"])], [])
    known.apply([described("b")], [])
    assert known.defaults == {"classify": "a"}
    known.apply([], ["a"])
    assert known.defaults == {}


def test_a_version_that_is_none_gets_everything() -> None:
    log = ChangeLog()
    log.touch("a")
    epoch = log.since("").version.split(".")[0]
    for version in (f"{epoch}.{'9' * 5000}", f"{epoch}.1.{'9' * 30}", "x", f"{epoch}.x", epoch):
        assert log.since(version).names == ["a"]


def test_what_came_before_a_reset_is_told() -> None:
    """A worker forgot removed names between two parts of its answer."""

    def part(name: str, **fields: object) -> pb.ListModelsResponse:
        model = pb.Model(name=name, description_json=json.dumps(described(name).to_json()))
        return pb.ListModelsResponse(models=[model], **fields)  # type: ignore[arg-type]

    parts = [part("a", version="e.1", more=True), part("a", version="e.2", reset=True)]

    async def ask(request: pb.ListModelsRequest) -> pb.ListModelsResponse:
        return parts.pop(0)

    told: list[str] = []
    asyncio.run(Follower(ask, told.append).refresh())
    assert told == ["a"]
