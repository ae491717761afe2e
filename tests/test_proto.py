"""The protocol files: linted, and the generated code is what they generate."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STUBS = ROOT / "service/stubs"


def test_the_stubs_are_fresh(tmp_path: Path) -> None:
    (tmp_path / "service/stubs").mkdir(parents=True)
    subprocess.run(["make", "-s", "proto", f"BIN={Path(sys.executable).parent}", f"OUT={tmp_path}"],
                   cwd=ROOT, check=True, capture_output=True)  # fmt: skip
    generated = {path.name: path.read_text() for path in (tmp_path / "service/stubs").iterdir()}
    committed = {path.name: path.read_text() for path in STUBS.glob("*_pb2*")}
    assert generated == committed


def test_the_protocol_files_are_clean() -> None:
    protolint = Path(sys.executable).with_name("protolint")
    if not protolint.exists() and shutil.which("protolint") is None:
        pytest.skip("protolint is not installed (pip install protolint-bin)")
    found = subprocess.run([protolint, "lint", "proto"], cwd=ROOT, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr.decode()
