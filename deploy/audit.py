"""Checks the pinned dependencies for known vulnerabilities: `python deploy/audit.py`.

Exits with 1 if there are any. Where PyPI's vulnerability database cannot be reached, it says so and
exits with 0: that says nothing about the dependencies.
"""

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
TIMEOUT_S = 300


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "10"]
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
        dependencies = json.loads(finished.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError):
        return skip("no answer")
    audited = [item for item in dependencies if "skip_reason" not in item]
    if not audited:
        return skip(dependencies[0]["skip_reason"] if dependencies else "nothing was audited")
    vulnerable = [item for item in audited if item["vulns"]]
    for item in vulnerable:
        for found in item["vulns"]:
            fixed = ", ".join(found["fix_versions"]) or "none"
            print(f"{item['name']} {item['version']}: {found['id']}, fixed in {fixed}")
    print(
        f"audited {len(audited)} of {len(dependencies)} dependencies: {len(vulnerable)} vulnerable"
    )
    return 1 if vulnerable else 0


def skip(why: str) -> int:
    print(f"audit skipped, the vulnerability database cannot be reached: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
