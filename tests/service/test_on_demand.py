"""Models that are loaded when a request asks for them, within a memory budget."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models.catalog import load_catalog
from service.ray.groups import multiplexed, trunk_groups
from tests.conftest import Running, running

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

    server.client.post("/classify?model=third", content=jpegs["coffee"])
    assert states(server)["second"] == "unloaded"
    assert ask(**{"X-Timeout-Ms": "1"}) == 504
    assert ask() == 200


def test_on_ray_what_is_loaded_on_demand_shares_a_group(catalog: Path) -> None:
    groups = trunk_groups(load_catalog(catalog))
    assert [group.name for group in groups] == ["first", "second", "third"]
    kept, shared = multiplexed(groups, ["first"])
    assert (kept.models, shared.models) == (["first"], ["second", "third"])
    assert shared.trunks == {"second", "third"}
    assert multiplexed(groups, ["first", "second", "third"]) == groups
