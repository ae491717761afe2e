"""`python -m benchmarks.rivals install [NAME...]` makes the rivals' environments."""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.rivals.environments import FOLDER, install, packages


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.rivals")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("install", help="make environments with pinned versions")
    command.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(packages())}")
    command.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    names = arguments.names or list(packages())
    if unknown := set(names) - set(packages()):
        command.error(f"unknown rivals {', '.join(sorted(unknown))}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        print(f"{name}: {' '.join(packages()[name]) or 'runs in this environment'}", flush=True)
        try:
            install(name, arguments.folder.absolute())
        except subprocess.CalledProcessError:
            failed.append(name)
    if failed:
        sys.exit(f"not installed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
