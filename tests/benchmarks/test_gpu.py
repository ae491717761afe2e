"""`benchmarks.gpu` itself, with one tiny network on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import load, report
from tests.test_architecture import ROOT


def test_a_part_is_measured_added_to_the_bundle_and_plotted(tmp_path: Path) -> None:
    path = tmp_path / "bundle.json"
    bundle = {**load(path), "parts": {"soak": {"rows": [{"network": "x", "holds": False}]}}}
    path.write_text(json.dumps(bundle))
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick"]
    command += ["--seconds", "0.02", "--folder", str(tmp_path)]
    command += ["--part", "ceiling:tiny,recovery"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = load(path)["parts"]
    assert list(parts) == ["soak", "ceiling:tiny", "recovery"]  # earlier ones stay
    rows = parts["ceiling:tiny"]["rows"]
    assert [row["batch"] for row in rows] == [1, 4]
    assert all(row["images_per_s"] > 0 and row["ran"] == "eager" for row in rows)
    assert "needs a GPU" in parts["recovery"]["rows"][0]["refused"]
    assert (tmp_path / "ceiling-tiny.png").is_file()
    assert "1 rows do not hold" in done.stdout
    assert "soak: network x, holds False" in done.stdout


def test_a_part_that_fails_is_in_the_table(tmp_path: Path) -> None:
    bundle = {
        "machine": {"gpu": None, "processor": "p"},
        "parts": {"lone:x": {"failed": "ended with status 1", "rows": []}},
    }
    report(bundle, tmp_path)
    assert "ended with status 1" in (tmp_path / "table.md").read_text()
