"""`benchmarks.gpu` itself, with one tiny network on the CPU."""

import asyncio
import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.__main__ import main, run_limited
from benchmarks.gpu.bundle import load, report
from benchmarks.gpu.options import Options, Rows, UnfinishedError
from benchmarks.gpu.parts import served
from benchmarks.gpu.parts.heads import heads
from benchmarks.gpu.parts.recovery import recovery
from benchmarks.gpu.server import Served
from benchmarks.gpu.serving import busy_and_gap
from benchmarks.photos import jpegs
from models import placements
from models.trunks import jpeg_batch
from models.trunks.engines.eager import Eager
from models.trunks.features import PassPlan
from tests.conftest import wait_until
from tests.models.test_fixtures import fixture
from tests.models.test_gpu_transform import decode_jpegs


def test_a_part_is_measured_added_to_the_bundle_and_plotted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bundle.json"
    bundle = {**load(path), "parts": {"soak": {"rows": [{"network": "x", "holds": False}]}}}
    path.write_text(json.dumps(bundle))
    command = ["gpu", "--device", "cpu", "--quick", "--seconds", "0.02", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--part", "ceiling:tiny:float32,recovery"])
    main()
    parts = load(path)["parts"]
    assert list(parts) == ["soak", "ceiling:tiny:float32", "recovery"]  # earlier ones stay
    rows = parts["ceiling:tiny:float32"]["rows"]
    assert [row["batch"] for row in rows] == [1, 4]
    assert all(row["images_per_s"] > 0 and row["ran"] == "eager" for row in rows)
    assert "needs a GPU" in parts["recovery"]["rows"][0]["refused"]
    assert (tmp_path / "ceiling-tiny-float32.png").is_file()
    printed = capsys.readouterr().out
    assert "1 rows do not hold" in printed
    assert "soak: network x, holds False" in printed


def test_a_run_goes_on_with_what_is_neither_complete_nor_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(options: Options) -> Rows:
        yield {"network": "tiny"}
        raise RuntimeError("no kernel")

    monkeypatch.setattr("benchmarks.gpu.__main__.PARTS", {
        "ended": lambda options: iter([{"network": "x"}]),
        "broken": lambda options: iter([{"network": "x"}]),
        "interrupted": lambda options: iter([{"network": "again"}]),
        "fails": fails,
        "recovery": recovery,
    })  # fmt: skip
    path = tmp_path / "bundle.json"
    before = {
        "ended": {"rows": [], "complete": True},
        "broken": {"rows": [], "failed": "took more than 480 s"},
        "interrupted": {"rows": [{"network": "tiny"}]},
    }
    path.write_text(json.dumps({**load(path), "parts": before}))
    command = ["gpu", "--device", "cpu", "--quick", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    main()
    parts = load(path)["parts"]
    assert parts["ended"] == before["ended"]
    assert parts["broken"] == before["broken"]
    assert parts["interrupted"]["rows"] == [{"network": "again"}]
    assert parts["fails"] == {"failed": "RuntimeError: no kernel", "rows": [{"network": "tiny"}]}
    assert parts["recovery"]["complete"]
    printed = capsys.readouterr().out
    assert "fails: RuntimeError: no kernel" in printed


def test_a_part_whose_time_is_up_goes_on_after_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_at_a_time(options: Options) -> Rows:
        done = len(options.own)
        for number in range(done, min(done + 2, 5)):
            yield {"fixture": number}
        if done + 2 < 5:
            raise UnfinishedError

    monkeypatch.setattr("benchmarks.gpu.__main__.PARTS", {"fixtures": two_at_a_time})
    command = ["gpu", "--device", "cpu", "--quick", "--folder", str(tmp_path), "--part", "fixtures"]
    monkeypatch.setattr(sys, "argv", command)
    path, counts = tmp_path / "bundle.json", []
    while "complete" not in load(path)["parts"].get("fixtures", {}):
        main()
        counts.append(len(load(path)["parts"]["fixtures"]["rows"]))
    assert counts == [2, 4, 5]
    main()  # a complete one begins anew
    assert len(load(path)["parts"]["fixtures"]["rows"]) == 2


@pytest.mark.parametrize("is_child", [False, True])
def test_what_has_failed_in_a_part_is_tried_again_when_the_part_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_child: bool
) -> None:
    def one(options: Options) -> Rows:
        done = {row["fixture"] for row in options.own}
        return iter([{"fixture": name} for name in ("a", "b") if name not in done])

    monkeypatch.setattr("benchmarks.gpu.__main__.PARTS", {"fixtures": one})
    path = tmp_path / "bundle.json"
    rows = [{"fixture": "a"}, {"fixture": "b", "failed": "RuntimeError: no kernel"}]
    path.write_text(json.dumps({**load(path), "parts": {"fixtures": {"rows": rows}}}))
    command = ["gpu", "--device", "cpu", "--quick", "--folder", str(tmp_path), "--part", "fixtures"]
    monkeypatch.setattr(sys, "argv", [*command, *(["--is-child"] if is_child else [])])
    main()
    assert load(path)["parts"]["fixtures"]["rows"] == (
        rows if is_child else [{"fixture": "a"}, {"fixture": "b"}]
    )


def test_an_engine_that_chooses_by_passes_gets_them_and_has_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waits(Eager):
        left = 3

        def run(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
            self.left -= 1
            return super().run(plan, inputs)

        @property
        def settled(self) -> bool:
            return self.left <= 0

    trunk = fixture("vqt")[0].trunk
    engine = Waits(trunk)
    monkeypatch.setattr(trunk, "engine", engine)
    module = sys.modules[heads.__module__]
    monkeypatch.setattr(module, "load_trunk", lambda *options: trunk)
    options = Options(
        folder=tmp_path, device=torch.device("cpu"), networks=("x",), engines=("eager",),
        precisions=("float32",), batches=(1,), clients=1, seconds=0.1, quick=True, shared=tmp_path,
    )  # fmt: skip
    assert [row["heads"] for row in heads(options)] == [4, 1, 4]
    engine.left = 10**6
    monkeypatch.setattr(module, "SETTLE_S", -1)
    with pytest.raises(TimeoutError, match="has not built its passes"):
        list(heads(options))


def test_a_served_engine_that_chooses_by_passes_gets_them_and_has_a_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[float] = []

    class Noted(Served):
        @property
        def trunk(self) -> Any:
            return SimpleNamespace(engine=SimpleNamespace(name="auto", settled=len(ran) > 3))

        def _run_sizes(self, item: object) -> None:
            ran.append(0)

        async def run(self, inputs: Any, calls: Any, clients: int, seconds: float,
                      images: int = 1) -> tuple[float, list[float]]:  # fmt: skip
            ran.append(seconds)
            return 0.0, []

    served = Noted(None, "x", 1)  # type: ignore[arg-type]
    asyncio.run(served.warm([b""], [[]], 1, 2.0))
    assert ran == [2.0, 0.1, 0.1, 0.1, 0, 2.0]
    ran.clear()
    monkeypatch.setattr("benchmarks.gpu.server.SETTLE_S", -1)
    with pytest.raises(TimeoutError, match="auto has not built"):
        asyncio.run(served.warm([b""], [[]], 1, 2.0))


def test_a_part_that_takes_too_long_is_killed_with_what_it_has_started(tmp_path: Path) -> None:
    assert run_limited(["sh", "-c", "exit 3"], 30) == 3
    child = tmp_path / "child"
    script = f"sleep 60 & echo $! > {child}.new && mv {child}.new {child}; sleep 60"
    with ThreadPoolExecutor(1) as threads:
        started = threads.submit(run_limited, ["sh", "-c", script], 2)
        wait_until(child.exists)
        assert started.result() is None
    wait_until(lambda: not is_running(int(child.read_text())))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_busy_time_and_gaps_are_those_of_all_streams_together() -> None:
    assert busy_and_gap([]) == (0.0, 0.0)
    assert busy_and_gap([(10, 12), (11, 15), (20, 21), (14, 16)]) == (7.0, 4.0)


def test_a_part_that_fails_is_in_the_table(tmp_path: Path) -> None:
    bundle = {
        "machine": {"gpu": None, "processor": "p"},
        "parts": {"lone:x": {"failed": "ended with status 1", "rows": []}},
    }
    report(bundle, tmp_path)
    assert "ended with status 1" in (tmp_path / "table.md").read_text()


def test_the_transform_of_a_gpu_is_served_and_compared_with_the_exact_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (jpeg_batch, placements, served):  # which CPUs do not have
        monkeypatch.setattr(module, "create_jpeg_decoder", lambda device: decode_jpegs)
    options = Options(
        tmp_path, torch.device("cpu"), ("tiny",), ("eager",), ("float32",),
        batches=(2,), clients=2, seconds=0.02, quick=True, shared=tmp_path,
    )  # fmt: skip
    decoded, cut, compared, damaged, row = served._by_gpu(options, jpegs())
    assert decoded["images_per_s"] > 0
    assert cut["refused"]  # by the stand-in
    assert damaged["not_decoded"] == 1
    assert (compared["photos"], compared["not_decoded"]) == (16, 0)
    assert 0 < compared["largest_difference"] <= 2
    assert compared["logit_error"] < 0.01
    assert compared["least_cosine"] > 0.999
    assert (row["transform"], row["ran"]) == ("gpu", "eager")
    assert row["images_per_s"] > 0
