"""`benchmarks.gpu` itself, with one tiny network on the CPU."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bundle import load, report
from benchmarks.gpu.options import Options, Rows
from benchmarks.gpu.parts.recovery import recovery


def test_a_part_is_measured_added_to_the_bundle_and_plotted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bundle.json"
    bundle = {**load(path), "parts": {"soak": {"rows": [{"network": "x", "holds": False}]}}}
    path.write_text(json.dumps(bundle))
    command = ["gpu", "--device", "cpu", "--quick", "--seconds", "0.02", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--part", "ceiling:tiny:float32,recovery"])
    main()
    parts = load(path)["parts"]
    assert list(parts) == ["soak", "ceiling:tiny:float32", "recovery"]  # earlier ones stay
    rows = parts["ceiling:tiny:float32"]["rows"]
    assert [row["batch"] for row in rows] == [1, 4]
    assert all(row["images_per_s"] > 0 and row["ran"] == "eager" for row in rows)
    assert "needs a GPU" in parts["recovery"]["rows"][0]["refused"]
    assert (tmp_path / "ceiling-tiny-float32.png").is_file()
    printed = capsys.readouterr().out
    assert "1 rows do not hold" in printed
    assert "soak: network x, holds False" in printed


def test_a_run_goes_on_with_what_is_neither_complete_nor_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(options: Options) -> Rows:
        yield {"network": "tiny"}
        raise RuntimeError("no kernel")

    monkeypatch.setattr("benchmarks.gpu.__main__.PARTS", {
        "ended": lambda options: iter([{"network": "x"}]),
        "broken": lambda options: iter([{"network": "x"}]),
        "interrupted": lambda options: iter([{"network": "again"}]),
        "fails": fails,
        "recovery": recovery,
    })  # fmt: skip
    path = tmp_path / "bundle.json"
    before = {
        "ended": {"rows": [], "complete": True},
        "broken": {"rows": [], "failed": "took more than 480 s"},
        "interrupted": {"rows": [{"network": "tiny"}]},
    }
    path.write_text(json.dumps({**load(path), "parts": before}))
    command = ["gpu", "--device", "cpu", "--quick", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    main()
    parts = load(path)["parts"]
    assert parts["ended"] == before["ended"]
    assert parts["broken"] == before["broken"]
    assert parts["interrupted"]["rows"] == [{"network": "again"}]
    assert parts["fails"] == {"failed": "RuntimeError: no kernel", "rows": [{"network": "tiny"}]}
    assert parts["recovery"]["complete"]
    printed = capsys.readouterr().out
    assert "fails: RuntimeError: no kernel" in printed


def test_a_part_that_fails_is_in_the_table(tmp_path: Path) -> None:
    bundle = {
        "machine": {"gpu": None, "processor": "p"},
        "parts": {"lone:x": {"failed": "ended with status 1", "rows": []}},
    }
    report(bundle, tmp_path)
    assert "ended with status 1" in (tmp_path / "table.md").read_text()
