"""From rounds to tables: medians, the limit, and answers that do not count."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.agreement import agreement
from benchmarks.bundle import Bundle, Measurement, Setting
from benchmarks.report import markdown, write_plots
from benchmarks.summary import Spread, Summary, by_setting

SETTING = Setting(transform="exact", precision="float32", photos="small", images=1)
MACHINE: dict[str, object] = {
    "processor": "A processor", "cores": 2, "governor": None, "kernel": "6.1", "python": "3.11",
    "versions": {"torch": "2.6"},
}  # fmt: skip


def served(server: str, rate: float, number: int = 0, **fields: Any) -> Measurement:
    """A closed loop in which each request took as many milliseconds as its place."""
    fields = {
        "kind": "closed", "level": 8, "latencies_ms": [float(place) for place in range(1, 101)],
        "answered": 100, "agreement": 1.0, "server_cpu_s": 0.5, "resident_bytes": 2**30, **fields,
    }  # fmt: skip
    return Measurement(model="vit", server=server, round=number, images_per_s=rate, **fields)


def bare(name: str, rate: float, number: int = 0) -> Measurement:
    return Measurement(
        model="vit", server="bare eager", round=number, kind="bare", level=name, images_per_s=rate
    )


def bundle(*measurements: Measurement, setting: Setting = SETTING) -> Bundle:
    return Bundle(
        time="2026-01-01T00:00:00+00:00", arguments={"rounds": 3}, machine=MACHINE,
        rivals={"litserve": ["litserve==1.0"]}, setting=setting, min_agreement=0.98,
        measurements=list(measurements),
    )  # fmt: skip


def summaries(*bundles: Bundle) -> dict[tuple[str, int | str], Summary]:
    [group] = by_setting(bundles).values()
    return {(each.server, each.level): each for each in group}


def test_a_spread_is_the_median_and_the_extremes() -> None:
    assert Spread.of([5, 1, 3]) == Spread(3, 1, 5)
    assert Spread.of([4, 2]) == Spread(3, 2, 4)
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_rounds_become_medians_and_the_limit_is_the_fastest_arrangement() -> None:
    rates = ((80, 100, 50), (90, 140, 50), (70, 90, 50))
    rows = [
        row
        for number, (rate, fast, slow) in enumerate(rates)
        for row in (served("a", rate, number), bare("fast", fast, number), bare("slow", slow))
    ]
    summary = summaries(bundle(*rows))["a", 8]
    assert summary.rounds == 3
    assert summary.images_per_s == Spread(80, 70, 90)
    assert summary.share == 0.8
    assert summary.p50_ms.median == 51
    assert summary.p99_ms.median == 100
    assert summary.cpu_ms.median == 5
    assert summary.resident_mib.median == 1024


def test_bundles_of_one_setting_are_rounds_of_one_comparison() -> None:
    one, two = bundle(served("a", 10)), bundle(served("a", 30))
    assert summaries(one, two)["a", 8].images_per_s == Spread(20, 10, 30)
    fast = Setting(transform="fast", precision="float32", photos="small", images=1)
    assert len(by_setting([one, bundle(served("a", 30), setting=fast)])) == 2


def test_processor_time_is_for_one_image_and_counts_answers_that_came_late() -> None:
    several = Setting(transform="exact", precision="float32", photos="small", images=4)
    row = served("a", 10, latencies_ms=[1.0], answered=25, server_cpu_s=1.0)
    assert summaries(bundle(row, setting=several))["a", 8].cpu_ms.median == 10


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"agreement": 0.5}, "top-5 agreement 0.50"),
        ({"agreement": None}, "top-5 agreement 0.00"),
        ({"failures": 100}, "100 of 200 requests failed"),
    ],
)
def test_a_fast_server_with_wrong_answers_is_invalid(fields: dict[str, Any], reason: str) -> None:
    right, wrong = served("right", 10), served("wrong", 999, **fields)
    result = bundle(right, wrong, bare("fast", 20))
    assert summaries(result)["wrong", 8].invalid == reason
    assert summaries(result)["right", 8].invalid == ""
    table = markdown([result])
    assert f"| wrong | 8 connections | invalid: {reason} |" in table
    assert "999" not in table
    assert table.index("| right |") < table.index("| wrong |")


def test_one_round_with_wrong_answers_makes_the_case_invalid() -> None:
    result = bundle(served("a", 10), served("a", 10, 1, agreement=0.1))
    assert summaries(result)["a", 8].invalid


def test_the_tables_name_the_machine_the_setting_and_what_was_not_measured() -> None:
    result = bundle(
        served("a", 80),
        served("a", 90, 1),
        served("a", 50, kind="open", level=80, failures=1),
        bare("fast", 100),
    )
    result.errors.append("round 1, vit, b: the server ended with status 1")
    assert markdown([result]).splitlines() == [
        "A processor, 2 cores, Linux 6.1, Python 3.11, torch 2.6",
        "litserve==1.0",
        "",
        "**vit**: exact transform, float32, small photos, 1 image in a request; medians of 2 "
        "rounds (lowest to highest); other programs used up to 0.00 cores",
        "",
        "| server | load | images/s | of the limit | p50 ms | p99 ms | CPU ms/image | MiB | top 5 "
        "| failed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| bare eager | fast | 100.0 | 1.00 |  |  |  |  |  |  |",
        "| a | 8 connections | 85.0 (80.0 to 90.0) | 0.85 | 51 | 100 | 5.0 | 1024 | 1.000 | 0 |",
        "| a | arrivals at 80 % of the limit | 50.0 | 0.50 | 51 | 100 | 5.0 | 1024 | 1.000 | 1 |",
        "",
        "- not measured: round 1, vit, b: the server ended with status 1",
    ]


@pytest.mark.parametrize("with_limit", [True, False])
def test_plots_are_made_of_bundles(tmp_path: Path, with_limit: bool) -> None:
    rows = [served("a", 10, level=1), served("a", 20), served("b", 15)]
    rows += [bare("fast", 30)] if with_limit else []
    [path] = write_plots([bundle(*rows)], tmp_path / "images")
    assert path.name == "vit-exact-float32-small-1.png"
    with Image.open(path) as image:
        assert image.width > image.height


def test_a_bundle_is_read_as_it_was_written(tmp_path: Path) -> None:
    original = bundle(served("a", 10), bare("fast", 20))
    original.save(tmp_path / "runs" / "one.json")
    assert Bundle.load(tmp_path / "runs" / "one.json") == original


@pytest.mark.parametrize("change", [lambda text: "[]", lambda text: json.dumps({"format": 99})])
def test_other_files_are_no_bundles(tmp_path: Path, change: Callable[[str], str]) -> None:
    path = tmp_path / "one.json"
    path.write_text(change(""))
    with pytest.raises(ValueError, match="not a bundle"):
        Bundle.load(path)


def test_agreement_is_the_share_of_expected_classes_that_are_named_in_place() -> None:
    def body(*classes: int) -> bytes:
        return json.dumps([{"index": index, "label": "x"} for index in classes]).encode()

    expected = [[[1, 2, 3, 4, 5]], [[6, 7, 8, 9, 10]]]
    assert agreement({0: body(5, 4, 3, 2, 1), 1: body(6, 7, 8, 9, 10)}, expected) == 1
    assert agreement({0: body(1, 2, 3, 4, 99)}, expected) == 0.8
    assert agreement({1: body(1, 2, 3, 4, 5)}, expected) == 0
    assert agreement({}, expected) == 0
    pair = [[[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]]
    assert agreement({0: body(*range(1, 11))}, pair) == 1
    assert agreement({0: body(*range(6, 11), *range(1, 6))}, pair) == 0  # the images swapped


def test_agreement_reads_json_within_json() -> None:
    text = json.dumps({"data": [json.dumps([{"index": index} for index in range(5)])]})
    assert agreement({0: text.encode()}, [[[0, 1, 2, 3, 4]]]) == 1
