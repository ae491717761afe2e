"""A model's description as JSON and back, and when it says that the model answers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from models import Registry
from models.catalog import ModelEntry
from models.description import ModelDescription, UnservedHead, head_from_json

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


def test_describing_all_models_reads_their_tasks_once(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        registry.add(ModelEntry(name=f"tiny-{number}", trunk="tiny", task="classify"))
        registry.load(f"tiny-{number}")
    passes, defaults = [0], registry._defaults

    def counted() -> dict[str, list[str]]:
        passes[0] += 1
        return defaults()

    monkeypatch.setattr(registry, "_defaults", counted)
    assert len(registry.describe_all()) >= 20
    assert passes == [1]


def test_descriptions_need_no_torch() -> None:
    program = "import sys, models.description; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
