"""Every published layout behind a server: one line in a catalog, real photos in, answers out."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from models.checkpoints import detect_format
from models.containers import open_container
from tests.conftest import Running, running
from tests.models.test_fixtures import FIXTURES, GOLDENS

# CLIP's towers are two trunks of a file, which their own tests serve; clips cannot be sent yet.
TOWERS = ("a_clip", "clip", "clip_jit")
SERVED = [name for name in FIXTURES if name not in TOWERS and "video" not in name]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """All fixtures in one catalog, each a trunk and two models on it."""
    if not GOLDENS.is_dir():
        pytest.skip("the fixtures are not here (shared/goldens)")
    lines = []
    for name in SERVED:
        path = next(iter(sorted((GOLDENS / name).glob("checkpoint*"))))
        settings = json.loads((GOLDENS / name / "meta.json").read_text())["hyperparameters"]
        lines.append(f'[trunks.{name}]\nsource = "file:{path}"\n[trunks.{name}.arguments]')
        plain = {k: v for k, v in settings.items() if isinstance(v, int | float | str | list)}
        lines += [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
        lines.append(f'[models.{name}]\ntrunk = "{name}"\ntask = "embed"\n')
        if "logits" in json.loads((GOLDENS / name / "meta.json").read_text())["outputs"]:
            lines.append(f'[models.{name}-classify]\ntrunk = "{name}"\ntask = "classify"\n')
    catalog = tmp_path_factory.mktemp("published") / "published.toml"
    catalog.write_text("\n".join(lines))
    with running(catalog) as started:
        started.wait_ready()
        yield started


@pytest.mark.parametrize("name", SERVED)
def test_a_photo_is_answered(server: Running, name: str, jpegs: dict[str, bytes]) -> None:
    described = server.client.get(f"/models/{name}").json()
    path = next(iter(sorted((GOLDENS / name).glob("checkpoint*"))))
    assert described["format"] == detect_format(open_container(path), {})[0].NAME
    body = {"files": {"image": jpegs["chelsea"]}, "params": {"model": name}}
    answer = server.client.post("/embed", **body)  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    embedding = np.array(answer.json()["results"][0]["embedding"])
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
    classifier = f"{name}-classify"
    if server.client.get(f"/models/{classifier}").status_code == 200:
        answer = server.client.post(
            "/classify", files={"image": jpegs["chelsea"]}, params={"model": classifier}
        )
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["results"][0]["predictions"]) == 5


def test_systems_mix_freely_in_one_request(server: Running, jpegs: dict[str, bytes]) -> None:
    files = [("image", ("photo", jpegs[name])) for name in ("chelsea", "coffee", "rocket")]
    answer = server.client.post("/predict", files=files, data={"models": SERVED})
    assert answer.status_code == 200, answer.text
    for result in answer.json()["results"]:
        found: dict[str, Any] = result["outputs"]
        assert found.keys() == set(SERVED)
        assert not [name for name, output in found.items() if "error" in output]
