"""One model's comparison as a figure."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from benchmarks.summary import Spread, Summary


def plot(summaries: Sequence[Summary], title: str) -> Figure:
    """Images per second, p99 and, if bare loops ran, the share of the limit, against connections.

    Error bars reach from the lowest to the highest round. Invalid results are left out.
    """
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    figure.suptitle(title)
    closed = [each for each in summaries if each.kind == "closed" and not each.invalid]
    limit = max((each.images_per_s.median for each in summaries if each.kind == "bare"), default=0)
    panels = figure.subplots(1, 3 if limit else 2)
    rate, latency = panels[:2]
    _lines(rate, closed, lambda each: each.images_per_s, "images/s")
    _lines(latency, closed, lambda each: each.p99_ms, "p99, ms")
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter(LogFormatter())
    latency.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    if limit:
        rate.axhline(limit, color="grey", linestyle=":", label="fastest bare loop")
        share = panels[2]
        _lines(share, closed, lambda each: _divided(each.images_per_s, limit), "share of the limit")
        share.axhline(1, color="grey", linestyle=":")
        share.set_ylim(bottom=0)
    rate.set_ylim(bottom=0)
    rate.legend()
    return figure


def _lines(
    axes: Axes, summaries: Sequence[Summary], value: Callable[[Summary], Spread], label: str
) -> None:
    """A line for each server. Their colours are the same in all axes."""
    counts = sorted({int(each.level) for each in summaries})
    for server in sorted({each.server for each in summaries}):
        rows = sorted(
            (each for each in summaries if each.server == server), key=lambda each: int(each.level)
        )
        spreads = [value(each) for each in rows]
        medians = [spread.median for spread in spreads]
        below = [spread.median - spread.low for spread in spreads]
        above = [spread.high - spread.median for spread in spreads]
        places = [int(each.level) for each in rows]
        axes.errorbar(places, medians, (below, above), marker="o", capsize=3, label=server)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("connections")
    axes.set_ylabel(label)


def _divided(spread: Spread, by: float) -> Spread:
    return Spread(spread.median / by, spread.low / by, spread.high / by)
