"""Requests made from the OpenAPI document by schemathesis, whose answers must be as it says."""

import subprocess
import sys
from pathlib import Path

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
# Its valid requests start fits.
LEFT_OUT = "^/heads$"


def check_document(url: str, folder: Path, *, seconds: int, examples: int) -> str:
    """Run all phases of schemathesis.

    Args:
        folder: for what it writes.
        seconds: the time for all phases.
        examples: the requests of each operation and phase, at most.

    Returns:
        Its report; empty if every answer was as documented.
    """
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json",
        "--phases", "examples,coverage,fuzzing,stateful", "--checks", ",".join(CHECKS),
        "--exclude-path-regex", LEFT_OUT, "--max-examples", str(examples),
        "--max-time", str(seconds), "--generation-deterministic", "--continue-on-failure",
        "--max-failures", "10", "--warnings", "off", "--no-color",
    ]  # fmt: skip
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if finished.returncode == 0 and "Test cases:" in finished.stdout:
        return ""
    return finished.stdout + finished.stderr
