"""`vitrail models verify` for the demo catalog and for every fixture, as a table.

    python -m benchmarks.verification ../shared/goldens ../shared/goldens2

A fixture is a folder with `checkpoint.*` and `meta.json`, whose `hyperparameters` are what the file
does not say. The table replaces the one in docs/verification.md.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from models.catalog import load_catalog
from models.errors import ModelsError
from models.verification.comparison import Comparison
from models.verification.targets import ServedAs, Target, catalog_target, file_target
from models.verification.verify import read_photos, verify

PAGE = Path(__file__).parents[1] / "docs/verification.md"
TABLE = re.compile(r"(?<=<!-- verified -->\n).*(?=<!-- /verified -->)", re.DOTALL)
HEADER = """\
| model | engine | compared with | largest errors | top-1 agreement | smallest cosine | result |
| --- | --- | --- | --- | --- | --- | --- |
"""


def main() -> None:
    """Verify, and write the page. The exit status is 1 if a model differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of fixtures")
    arguments = parser.parse_args()
    rows = []
    for row in _rows(arguments.folders):
        print(row, file=sys.stderr)
        rows.append(row)
    command = f"python -m benchmarks.verification {' '.join(map(str, arguments.folders))}"
    table = f"`{command}` made this table.\n\n{HEADER}" + "\n".join(rows) + "\n"
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda _: table, page), encoding="utf-8")
    sys.exit(any("**" in row for row in rows))


def _rows(folders: list[Path]) -> Iterator[str]:
    for name in load_catalog("demo").models:
        load = partial(catalog_target, name, "demo", ServedAs())
        yield from _compare(f"`{name}` (demo)", load)
    for folder in folders:
        for meta in sorted(folder.glob("*/meta.json")):
            path = _checkpoint(meta.parent)
            settings = json.loads(meta.read_text())["hyperparameters"]
            load = partial(file_target, path, settings, ServedAs())
            yield from _compare(f"`{folder.name}/{meta.parent.name}`", load)


def _checkpoint(folder: Path) -> Path:
    """The fixture's main file; DeepSpeed names its own otherwise."""
    return next(path for ending in ("checkpoint.*", "*.pt") for path in sorted(folder.glob(ending)))


def _compare(name: str, load: Callable[[], Target]) -> Iterator[str]:
    try:
        target = load()
        for comparison in verify(target.served, target.eager, target.libraries, read_photos(None)):
            yield _row(name, target.served.trunk.engine.report().name, comparison)
            name = ""
    except ModelsError as error:
        yield f"| {name} | | | | | | refused: {_first_line(error)} |"
    except Exception as error:  # one that fails is a row, and not the end of the others
        kind = type(error).__name__
        yield f"| {name} | | | | | | **failed**: {kind}: {_first_line(error)} |"


def _first_line(error: Exception) -> str:
    """The first line of a message, without the folder that it begins with."""
    first = (str(error).splitlines() or [""])[0].replace("|", "/")
    first = first.rpartition("/")[2] if first.startswith("/") else first
    return first[:120]


def _row(name: str, engine: str, comparison: Comparison) -> str:
    if not comparison.errors:
        return f"| {name} | | {comparison.reference} | | | | |"
    errors = ", ".join(f"{output} {error:.1e}" for output, error in comparison.errors.items())
    top1 = "" if comparison.top1_agreement is None else f"{comparison.top1_agreement:.0%}"
    cosine = "" if comparison.cosine is None else f"{comparison.cosine:.6f}"
    verdict = "agrees" if comparison.passed else "**differs**"
    cells = (name, engine, comparison.reference, errors, top1, cosine, verdict)
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
