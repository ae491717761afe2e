"""A model's description as JSON and back, and when it says that the model answers."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import Registry
from models.catalog import ModelEntry
from models.description import ModelDescription, State, UnservedHead, head_from_json

BEFORE_LOADING = [
    "name", "task", "tasks", "default_for", "trunk", "text_trunk", "state", "reason", "source",
    "device", "dtype", "licence", "description",
]  # fmt: skip
ONCE_LOADED = [
    "format", "architecture", "engine", "precision", "transform", "memory_bytes", "head_bytes",
    "head", "preprocess", "labels", "model_digest", "preprocess_digest", "modalities",
    "load_seconds",
]  # fmt: skip


@pytest.fixture
def registry(tiny_catalog: Path) -> Registry:
    return Registry.from_catalog(tiny_catalog, device="cpu")


@pytest.fixture
def description(registry: Registry) -> ModelDescription:
    return registry.describe("tiny")


def test_members_that_need_the_weights_are_absent_before_loading(registry: Registry) -> None:
    members = registry.describe("tiny").to_json()
    assert list(members) == BEFORE_LOADING
    assert members["text_trunk"] is members["reason"] is None
    registry.load("tiny")
    members = registry.describe("tiny").to_json()
    assert list(members) == BEFORE_LOADING + ONCE_LOADED
    assert members["head"] is None
    assert members["tasks"] == ["classify", "embed", "attention"]
    registry.unload("tiny")
    assert list(registry.describe("tiny").to_json()) == BEFORE_LOADING


def test_a_description_survives_json(registry: Registry) -> None:
    registry.load("tiny")
    for name in ("tiny", "conv"):
        sent = replace(registry.describe(name), startup=False)
        text = json.dumps(sent.to_json())
        assert '"startup": false' in text
        received = ModelDescription.from_json(json.loads(text))
        assert json.dumps(received.to_json()) == text
        assert (received.tasks, received.is_loaded) == (sent.tasks, sent.is_loaded)


def test_members_of_a_newer_worker_are_passed_on(description: ModelDescription) -> None:
    newer = {**description.to_json(), "engine": "openvino", "state": "sleeping"}
    received = ModelDescription.from_json(newer)
    assert not received.is_ready
    assert received.to_json() == newer


def test_a_description_without_its_name_is_refused(description: ModelDescription) -> None:
    members = description.to_json()
    del members["name"]
    with pytest.raises(TypeError, match="name"):
        ModelDescription.from_json(members)


def test_a_model_answers_if_it_is_ready_for_no_reason_against(
    description: ModelDescription,
) -> None:
    assert not description.is_ready
    ready = replace(description, state="ready")
    assert ready.is_ready
    assert not replace(ready, reason="the trunk fails its probe").is_ready


def test_a_head_that_is_not_served_survives_json() -> None:
    progress = {"stage": "epochs", "done": 1, "total": 5, "accuracy": None}
    fitting = UnservedHead(
        name="pets", state="fitting", progress=progress, trunk="tiny", task="classify"
    )
    members = fitting.to_json()
    assert members == {
        "name": "pets", "state": "fitting", "reason": None, "progress": progress, "trunk": "tiny",
        "task": "classify",
    }  # fmt: skip
    assert head_from_json({**members, "eta_s": 3}) == fitting
    broken = UnservedHead(name="pets", state="failed", reason="no head file")
    assert broken.to_json() == {"name": "pets", "state": "failed", "reason": "no head file"}
    assert not fitting.is_ready


def test_a_served_head_is_told_from_one_that_is_not(description: ModelDescription) -> None:
    assert head_from_json(description.to_json()) == description


def test_all_models_are_described_as_each_is_alone(registry: Registry) -> None:
    registry.load("conv")
    registry.load("tiny")
    everything = registry.describe_all()
    assert list(everything) == list(registry.catalog.models)
    assert everything == {name: registry.describe(name) for name in everything}


def test_each_task_has_the_default_model_that_requests_get(registry: Registry) -> None:
    registry.load("conv")
    registry.load("tiny")
    described = registry.describe_all().values()
    tasks = [task for model in described for task in model.default_for]
    assert sorted(tasks) == sorted(set(tasks))
    assert set(tasks) >= {"classify", "embed", "attention"}
    for model in described:
        for task in model.default_for:
            assert registry.default_model(task).name == model.name


class OnlyLookups(dict[str, Any]):
    """A dictionary whose keys and values cannot be listed."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("looks at every model")

    def keys(self) -> Any:
        raise AssertionError("looks at every model")

    values = items = copy = keys


def test_work_on_one_model_looks_at_no_other(registry: Registry) -> None:
    registry.load("tiny")
    slots = registry._slots
    slots._by_name, slots.entries = OnlyLookups(slots._by_name), OnlyLookups(slots.entries)
    registry.catalog = replace(registry.catalog, models=slots.entries)
    for number in range(3):
        registry.add(ModelEntry(name=f"tiny-{number}", trunk="tiny", task="classify"))
        registry.load(f"tiny-{number}")
    assert registry.ready("tiny-1").name == "tiny-1"
    assert registry.describe("tiny-1").is_ready
    assert registry.default_model("attention").name == "tiny"
    registry.remove("tiny-1")
    assert registry.states()[State.READY] == 3
    assert registry.states()[State.UNLOADED] == 2
    with pytest.raises(AssertionError, match="every model"):
        registry.describe_all()


def test_the_next_model_becomes_a_tasks_default(registry: Registry) -> None:
    registry.load("conv")
    registry.load("tiny")  # before it in the catalog
    changed: list[str] = []
    registry.on_change = changed.append
    first = registry.default_model("attention").name
    assert first == "tiny"
    assert "attention" in registry.describe(first).default_for
    registry.load("tiny-embed")
    changed.clear()
    registry.unload("tiny")
    assert registry.default_model("attention").name == "tiny-embed"
    assert "attention" in registry.describe("tiny-embed").default_for
    assert "attention" not in registry.describe("tiny").default_for
    assert {"tiny", "tiny-embed"} <= set(changed)


def test_whether_a_trunk_is_used_is_read_under_the_lock(registry: Registry) -> None:
    slots = registry._slots
    registry.load("tiny")

    class Guarded(defaultdict[str, set[str]]):
        def get(self, *key: Any) -> Any:
            assert slots._lock.locked()
            return super().get(*key)

    slots._users = Guarded(set, slots._users)
    assert slots.is_used("tiny")
    assert not slots.is_used("other")


def test_descriptions_need_no_torch() -> None:
    program = "import sys, models.description; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
