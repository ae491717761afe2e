"""The short form of `make chaos`."""

import subprocess
import sys
from pathlib import Path

FAULTS = ("worker killed", "gateway killed", "pass raises")


def test_nothing_is_lost_when_processes_are_killed(tiny_catalog: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--catalog", str(tiny_catalog)]
    command += ["--model", "tiny", "--faults", ",".join(FAULTS), "--images", "16"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "requests lost    0" in finished.stdout
    for fault in FAULTS:
        [row] = [line for line in finished.stdout.splitlines() if line.startswith(fault)]
        assert int(row.removeprefix(fault).split()[0]) > 0
