"""The table of `benchmarks.overload`."""

from collections import Counter

import pytest

from benchmarks.load import Load
from benchmarks.overload import COLUMNS, Capacity, cells, cores


def test_only_answers_in_time_count_and_every_request_is_accounted_for() -> None:
    load = Load(span=10.0, latencies=[0.1] * 60 + [0.9] * 20, answered=80)
    load.statuses = Counter({200: 80, 429: 15, 504: 3, 503: 1, 0: 1})
    load.cpu_s = 1.0
    load.lags = [0.001] * 98 + [0.02] * 2
    full = Capacity(rate=10.0, server_cores=1.9, load_cores=0.02, refusal_cpu_s=0.1)
    row = (*cells(load, 3, 0.5, full, 8.0), *cores(load, 12.0, 15.0, 8.0), "1024 MiB")
    values = dict(zip(COLUMNS, row, strict=True))
    assert values["goodput"] == "6.0/s"
    assert values["of capacity"] == "60 %"
    # 19 refusals in 10 s took 0.19 cores, and the generator 0.08 more than at the capacity
    assert values["of left"] == f"{60 / (1 - 0.27 / 1.9):.0f} %"
    counts = [values[name] for name in ("200", "429", "504", "other", "unanswered")]
    assert counts == ["80", "15", "3", "1", "1"]
    assert values["lag"] == "20 ms"
    taken = [values[name] for name in ("load", "server", "others")]
    assert taken == ["0.10", "1.20", "0.20"]


@pytest.mark.parametrize(
    ("rate", "server_cores", "expected"), [(10.0, 0.2, "60 %"), (0.0, 1.9, "-"), (0.0, 0.0, "-")]
)
def test_there_is_no_share_of_nothing(rate: float, server_cores: float, expected: str) -> None:
    load = Load(span=10.0, latencies=[0.1] * 60, answered=60)
    load.statuses = Counter({200: 60, 429: 40})
    full = Capacity(rate, server_cores, load_cores=0.0, refusal_cpu_s=0.1)  # refusing takes 0.4
    values = dict(zip(COLUMNS, cells(load, 3, 0.5, full, 8.0), strict=False))
    assert (values["of capacity"], values["of left"]) == (expected, "-")
