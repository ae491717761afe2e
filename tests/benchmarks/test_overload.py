"""The table of `benchmarks.overload`."""

from collections import Counter

from benchmarks.load import Load
from benchmarks.overload import COLUMNS, cells


def test_only_answers_in_time_count_and_every_request_is_accounted_for() -> None:
    load = Load(span=10.0, latencies=[0.1] * 60 + [0.9] * 20, answered=80)
    load.statuses = Counter({200: 80, 429: 15, 504: 3, 503: 1, 0: 1})
    values = dict(zip(COLUMNS, cells(load, 3, 0.5, 10.0, 8.0, 2**30), strict=True))
    assert values["goodput"] == "6.0/s"
    assert values["of capacity"] == "60 %"
    counts = [values[name] for name in ("200", "429", "504", "other", "unanswered")]
    assert counts == ["80", "15", "3", "1", "1"]
    assert values["memory"] == "1024 MiB"
