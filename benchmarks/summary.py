"""What rounds have in common: medians with their spread, and whether the answers were right."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.bundle import Bundle, Measurement, Setting
from benchmarks.load import percentile

# A server that refuses requests is fast; more failures than this share are not a result.
MAX_FAILURES = 0.01


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several rounds, and their extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """
        Raises:
            ValueError: no values.
        """
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values")
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One server, or bare loop, under one load in all rounds.

    Args:
        share: of the limit's images per second, which is the fastest bare loop's median; None
            where no bare loop ran.
        cpu_ms: the server's processor time for an answered image.
        invalid: why the speed does not count; empty if it does.
    """

    model: str
    server: str
    kind: str
    level: int | str
    rounds: int
    images_per_s: Spread
    share: float | None
    p50_ms: Spread
    p99_ms: Spread
    cpu_ms: Spread
    resident_mib: Spread
    other_cores: float
    agreement: float | None
    failures: int
    invalid: str


def by_setting(bundles: Sequence[Bundle]) -> dict[Setting, list[Summary]]:
    """The summaries of all bundles. Rounds of several bundles with one setting are put together."""
    groups: dict[Setting, list[Bundle]] = {}
    for bundle in bundles:
        groups.setdefault(bundle.setting, []).append(bundle)
    return {setting: _summaries(group) for setting, group in groups.items()}


def _summaries(bundles: Sequence[Bundle]) -> list[Summary]:
    cases: dict[tuple[str, str, str, int | str], list[Measurement]] = {}
    for bundle in bundles:
        for row in bundle.measurements:
            cases.setdefault((row.model, row.server, row.kind, row.level), []).append(row)
    setting = bundles[0].setting
    min_agreement = max(bundle.min_agreement for bundle in bundles)
    limits = _limits(cases.values())
    return [
        _summary(rows, setting.images, limits.get(rows[0].model), min_agreement)
        for rows in cases.values()
    ]


def _limits(cases: Iterable[list[Measurement]]) -> dict[str, float]:
    """For each model the images per second of its fastest bare loop."""
    limits: dict[str, float] = {}
    for rows in cases:
        if rows[0].kind == "bare":
            rate = statistics.median(row.images_per_s for row in rows)
            limits[rows[0].model] = max(rate, limits.get(rows[0].model, 0.0))
    return limits


def _summary(
    rows: Sequence[Measurement], images: int, limit: float | None, min_agreement: float
) -> Summary:
    def spread(value: Callable[[Measurement], float]) -> Spread:
        return Spread.of(value(row) for row in rows)

    first, rates = rows[0], spread(lambda row: row.images_per_s)
    agreements = [row.agreement for row in rows if row.agreement is not None]
    return Summary(
        model=first.model,
        server=first.server,
        kind=first.kind,
        level=first.level,
        rounds=len(rows),
        images_per_s=rates,
        share=rates.median / limit if limit else None,
        p50_ms=spread(lambda row: percentile(row.latencies_ms, 0.5)),
        p99_ms=spread(lambda row: percentile(row.latencies_ms, 0.99)),
        cpu_ms=spread(lambda row: 1e3 * row.server_cpu_s / max(1, row.answered * images)),
        resident_mib=spread(lambda row: row.resident_bytes / 2**20),
        other_cores=max(row.other_cores for row in rows),
        agreement=min(agreements, default=None),
        failures=sum(row.failures for row in rows),
        invalid=_fault(rows, min_agreement),
    )


def _fault(rows: Sequence[Measurement], min_agreement: float) -> str:
    """Why these measurements do not count; empty if they do."""
    if rows[0].kind == "bare":
        return ""
    answered, failed = sum(row.answered for row in rows), sum(row.failures for row in rows)
    if failed > MAX_FAILURES * (answered + failed):
        return f"{failed} of {answered + failed} requests failed"
    agreement = min(row.agreement or 0.0 for row in rows)
    if agreement < min_agreement:
        return f"top-5 agreement {agreement:.2f}"
    return ""
