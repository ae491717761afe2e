"""Tables and plots of comparisons: `python -m benchmarks.report BUNDLE... --output FOLDER`.

Prints Markdown, and writes one PNG file for each model. Bundles with the same setting count as
further rounds of one comparison.
"""

import argparse
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.bundle import Bundle, Setting
from benchmarks.plots import plot
from benchmarks.summary import Spread, Summary, by_setting

HEADER = (
    "server", "load", "images/s", "of the limit", "p50 ms", "p99 ms", "CPU ms/image", "MiB",
    "top 5", "failed",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.report")
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--output", type=Path, help="a folder for the plots; none without it")
    arguments = parser.parse_args()
    try:
        bundles = [Bundle.load(path) for path in arguments.bundles]
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(markdown(bundles))
    if arguments.output:
        for path in write_plots(bundles, arguments.output):
            print(f"![{path.stem}]({path})")


def markdown(bundles: Sequence[Bundle]) -> str:
    """The tables of all settings and models, with the machines above them."""
    lines = [*dict.fromkeys(map(_machine, bundles)), *_rivals(bundles), ""]
    for setting, model, summaries in _models(bundles):
        lines += [f"**{model}**: {_describe(setting)}; {_rounds(summaries)}", ""]
        lines += [_row(HEADER), _row(["---"] * len(HEADER))]
        lines += [_row(_cells(summary)) for summary in sorted(summaries, key=_order)]
        lines.append("")
    for bundle in bundles:
        lines += [f"- not measured: {error}" for error in bundle.errors]
    return "\n".join(lines)


def write_plots(bundles: Sequence[Bundle], folder: Path) -> list[Path]:
    """Write one PNG file for each setting and model. The folder is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for setting, model, summaries in _models(bundles):
        parts = [model, setting.transform, setting.precision, setting.photos, str(setting.images)]
        path = folder / f"{'-'.join(parts)}.png"
        plot(summaries, f"{model}, {_describe(setting)}").savefig(path, dpi=120)
        paths.append(path)
    return paths


def _models(bundles: Sequence[Bundle]) -> Iterable[tuple[Setting, str, list[Summary]]]:
    for setting, summaries in by_setting(bundles).items():
        ordered = sorted(summaries, key=lambda summary: summary.model)
        for model, group in itertools.groupby(ordered, key=lambda summary: summary.model):
            yield setting, model, list(group)


def _machine(bundle: Bundle) -> str:
    machine = bundle.machine
    versions = machine["versions"]
    assert isinstance(versions, dict)
    own = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    governor = f"governor {machine['governor']}, " if machine["governor"] else ""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {governor}"
        f"Linux {machine['kernel']}, Python {machine['python']}, {own}"
    )


def _rivals(bundles: Sequence[Bundle]) -> list[str]:
    """A line with the rivals' pinned packages, if there were rivals."""
    pins = [pin for bundle in bundles for packages in bundle.rivals.values() for pin in packages]
    return [", ".join(dict.fromkeys(pins))] if pins else []


def _describe(setting: Setting) -> str:
    return (
        f"{setting.transform} transform, {setting.precision}, {setting.photos} photos, "
        f"{setting.images} {'image' if setting.images == 1 else 'images'} in a request"
    )


def _rounds(summaries: Sequence[Summary]) -> str:
    rounds = max(summary.rounds for summary in summaries)
    busy = max(summary.other_cores for summary in summaries)
    medians = f"medians of {rounds} rounds (lowest to highest)" if rounds > 1 else "one round"
    return f"{medians}; other programs used up to {busy:.2f} cores"


def _order(summary: Summary) -> tuple[object, ...]:
    """Bare loops first, then by load; the fastest first, and invalid ones last."""
    kinds = ("bare", "closed", "open")
    level = summary.level if isinstance(summary.level, int) else 0
    return kinds.index(summary.kind), level, bool(summary.invalid), -summary.images_per_s.median


def _cells(summary: Summary) -> list[str]:
    bare = summary.kind == "bare"
    share = f"{summary.share:.2f}" if summary.share is not None else ""
    return [
        summary.server,
        _load(summary),
        f"invalid: {summary.invalid}" if summary.invalid else _spread(summary.images_per_s, 1),
        "" if summary.invalid else share,
        "" if bare else _spread(summary.p50_ms),
        "" if bare else _spread(summary.p99_ms),
        "" if bare else f"{summary.cpu_ms.median:.1f}",
        "" if bare else f"{summary.resident_mib.median:.0f}",
        "" if summary.agreement is None else f"{summary.agreement:.3f}",
        "" if bare else str(summary.failures),
    ]


def _load(summary: Summary) -> str:
    if summary.kind == "open":
        return f"arrivals at {summary.level} % of the limit"
    if summary.kind == "closed":
        return f"{summary.level} {'connection' if summary.level == 1 else 'connections'}"
    return str(summary.level)


def _spread(spread: Spread, digits: int = 0) -> str:
    median, low, high = (
        f"{value:.{digits}f}" for value in (spread.median, spread.low, spread.high)
    )
    return median if low == high else f"{median} ({low} to {high})"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
