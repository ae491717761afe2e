"""`vitrail tune`: what it measures is written into the catalog, and that catalog serves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from models import Registry
from models.catalog import BUILT_IN, load_catalog
from models.catalog_file import update_trunk
from models.checkpoints.store import Store
from models.errors import CatalogError
from models.trunks.engines.report import Agreement
from service.cli import app
from service.tuning.candidate import Candidate, Measurement
from service.tuning.search import choose

Tune = Callable[..., Any]


@pytest.fixture
def catalog(tiny_catalog: Path, tmp_path: Path) -> Path:
    """The tiny catalog as a user's file, with comments."""
    path = tmp_path / "mine.toml"
    text = tiny_catalog.read_text().replace("file:", f"file:{tiny_catalog.parent}/")
    path.write_text(
        text.replace("[trunks.tiny]", "# my trunk\n[trunks.tiny]\ndtype = 'float32'  # why")
    )
    return path


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Tune:
    """Runs the command with a store of its own."""
    monkeypatch.setenv("VITRAIL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "120")

    return lambda *arguments: CliRunner().invoke(app, ["tune", *arguments])


def test_the_best_settings_are_written_and_the_catalog_serves(
    tune: Tune, catalog: Path, tmp_path: Path
) -> None:
    result = tune("tiny", "--catalog", str(catalog), "--seconds", "4", "--write")
    assert result.exit_code == 0, result.stderr
    assert "images/s" in result.stdout
    assert "VITRAIL_STREAMS=" in result.stdout
    assert "no images to calibrate on: use --images" in result.stderr
    text = catalog.read_text()
    assert "# my trunk" in text
    assert "dtype" not in text
    trunk = load_catalog(catalog).trunks["tiny"]
    assert trunk.engine in ("eager", "openvino")
    assert (trunk.precision, trunk.transform) == ("float32", "exact")
    assert trunk.max_batch_size
    model = Registry.from_catalog(catalog, device="cpu", store=Store(tmp_path / "store")).get(
        "tiny"
    )
    assert model.predict([Image.new("RGB", (200, 200))], top_k=2)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("efficientnet-lite0", "--write"), "copy it with `vitrail models copy demo FILE.toml`"),
        (("minilm",), "minilm takes texts; tune measures models that take images"),
        (("nothing",), "no model 'nothing'"),
        (("efficientnet-lite0", "--images", "{empty}"), "no image in"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    tune: Tune, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "empty").mkdir()
    result = tune(*(each.format(empty=tmp_path / "empty") for each in arguments))
    assert result.exit_code == 2
    assert reason in " ".join(result.stderr.split())


def measured(rate: float, error: float = 0.0, engine: str = "openvino") -> Measurement:
    candidate = Candidate(
        engine=engine, precision="float32", transform="exact", streams=1, max_batch_size=16
    )
    return Measurement(candidate, rate, 1.0, Agreement(error, 1))


def test_the_fastest_within_the_tolerance_is_chosen() -> None:
    best, faster, inexact = measured(100), measured(150), measured(200, error=0.1)
    assert choose(best, [best, faster, inexact], 1e-5) is faster
    assert choose(best, [best, faster, inexact], 0.2) is inexact
    assert choose(best, [best, measured(101)], 1e-5) is best
    assert choose(best, [inexact], 1e-5) is best


def test_int8_is_written_with_its_calibration_folder() -> None:
    candidate = Candidate(
        engine="auto", precision="int8", transform="exact", streams=1, max_batch_size=4
    )
    assert candidate.trunk_settings("../photos") == {
        "engine": "auto",
        "precision": "int8",
        "transform": "exact",
        "max_batch_size": 4,
        "calibration": "../photos",
    }


def test_a_catalog_keeps_its_comments_and_built_in_ones_are_not_changed(catalog: Path) -> None:
    before = catalog.read_text()
    update_trunk(catalog, "conv", {"engine": "openvino", "max_batch_size": 4})
    trunk = load_catalog(catalog).trunks["conv"]
    assert (trunk.engine, trunk.max_batch_size) == ("openvino", 4)
    kept = [line for line in catalog.read_text().splitlines() if line in before.splitlines()]
    assert kept == before.splitlines()
    with pytest.raises(CatalogError, match="is built in"):
        update_trunk(BUILT_IN / "demo.toml", "minilm", {"engine": "eager"})
