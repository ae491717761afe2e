"""Runs Helm in a process of its own: `helm_python` brings Go's runtime, which does not bear the
signals and threads of the tests' process.

Reads `{"chart": path, "values": {...}}` from standard input. Writes `{"files": {path: text}}` of
the rendered chart, `{"lint": {...}}` of the linter without values, or `{"error": text}`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def ask(chart: Path, values: dict[str, Any] | None) -> dict[str, Any]:
    """Render the chart with these values; without, lint it."""
    finished = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps({"chart": str(chart), "values": values}),
        capture_output=True,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


def _answer(chart: str, values: dict[str, Any] | None) -> dict[str, Any]:
    import helm_python as helm

    if values is None:
        return {"lint": helm.lint(chart)}
    try:
        with helm.Chart.load(chart) as loaded:
            return {"files": loaded.render(values, name="demo", namespace="prod")}
    except helm.HelmError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    json.dump(_answer(**json.load(sys.stdin)), sys.stdout)
