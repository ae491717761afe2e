"""The short form of `make chaos`."""

import subprocess
import sys
from pathlib import Path


def test_nothing_is_lost_when_processes_are_killed(tiny_catalog: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--catalog", str(tiny_catalog)]
    command += ["--model", "tiny", "--faults", "worker killed,gateway killed"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert " answered, 0 lost" in finished.stdout
    for fault in ("worker killed", "gateway killed"):
        [row] = [line for line in finished.stdout.splitlines() if line.startswith(fault)]
        assert int(row.removeprefix(fault).split()[0]) > 0
