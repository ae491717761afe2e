"""A short comparison from the command to its bundle, with the real servers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bundle import Bundle, Measurement
from benchmarks.candidates import CANDIDATES
from benchmarks.processes import marked_processes, usage
from benchmarks.rivals.environments import packages, python_of
from benchmarks.rivals.options import Options
from benchmarks.servers import MARK, Server, StartError, free_port
from benchmarks.workload import grouped

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Vitrail, plain FastAPI and the eager bare loop, for one second each."""
    folder = tmp_path_factory.mktemp("comparison")
    command = [
        sys.executable, "-m", "benchmarks.comparison", "--models", "test_vit",
        "--servers", "vitrail,plain_fastapi,litserve", "--engines", "eager", "--connections", "2",
        "--open-loop", "0.2", "--rounds", "1", "--seconds", "1", "--warm", "1",
        "--images-per-request", "2", "--folder", str(folder), "--output", str(folder / "out.json"),
    ]  # fmt: skip
    environment = {**os.environ, "VITRAIL_STORE": str(folder / "store")}
    subprocess.run(command, check=True, env=environment)
    return Bundle.load(folder / "out.json")


def rows(result: Bundle, server: str) -> dict[str, Measurement]:
    return {row.kind: row for row in result.measurements if row.server == server}


@pytest.mark.parametrize("server", ["vitrail", "plain_fastapi"])
def test_servers_answer_under_load_as_plain_timm_does(result: Bundle, server: str) -> None:
    measured = rows(result, server)
    assert measured.keys() == {"closed", "open"}
    for row in measured.values():
        assert row.agreement is not None
        assert row.agreement >= result.min_agreement
        assert row.failures == 0
        assert row.images_per_s > 0
        assert 0 < len(row.latencies_ms) <= row.answered
        assert row.server_cpu_s > 0
        assert row.resident_bytes > 50 * 2**20
    limit = max(row.images_per_s for row in result.measurements if row.kind == "bare")
    assert measured["open"].offered_per_s == pytest.approx(0.2 * limit)


def test_every_arrangement_of_the_bare_loop_is_measured(result: Bundle) -> None:
    bare = [row for row in result.measurements if row.server == "bare eager"]
    assert len(bare) == 4
    assert all(row.images_per_s > 0 for row in bare)


def test_a_rival_that_is_not_installed_is_reported_and_the_others_are_measured(
    result: Bundle,
) -> None:
    assert rows(result, "litserve") == {}
    [error] = result.errors
    assert error.startswith("round 1, test_vit, litserve: ")
    assert "benchmarks.rivals install litserve" in error


def test_the_bundle_names_the_machine_and_the_arguments(result: Bundle) -> None:
    assert result.machine["cores"] == len(os.sched_getaffinity(0))
    assert result.arguments["connections"] == [2]
    assert result.rivals == {"plain_fastapi": [], "litserve": packages()["litserve"]}


def test_unknown_servers_are_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.comparison", "--servers", "x", "--output", "y"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "unknown servers x" in finished.stderr


def test_every_rival_has_an_environment_and_a_program() -> None:
    assert set(CANDIDATES) == {"vitrail", *packages()}
    for name, pins in packages().items():
        assert (Path("benchmarks/rivals") / f"{name}.py").is_file()
        assert all("==" in pin for pin in pins)
    assert python_of("plain_fastapi", Path("x")) == Path(sys.executable)
    assert python_of("litserve", Path("x")) == Path("x/litserve/bin/python")


def test_options_pass_through_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(
        architecture="test_vit", weights=Path("/w"), port=1, folder=Path("/f"), workers=2, images=8
    )
    for name, value in options.environment().items():
        monkeypatch.setenv(name, value)
    assert Options.from_environment() == options
    assert options.max_requests == 1


def test_a_server_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    log = tmp_path / "output.log"
    command = [sys.executable, "-c", "raise SystemExit('no port')"]
    server = Server(command, free_port(), log=log)
    with pytest.raises(StartError, match=r"status 1; log: .*output\.log"):
        server.__enter__()
    assert log.read_text() == "no port\n"


def test_all_processes_of_a_server_are_counted_and_ended() -> None:
    """Also one that its parent has left behind."""
    program = (
        "import http.server, os, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; b = bytes(10**8); time.sleep(99)'],"
        " start_new_session=True)\n"
        "class Ready(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Ready).serve_forever()\n"
    )
    port = free_port()
    with Server([sys.executable, "-c", program, str(port)], port) as server:
        mark = server.mark
        pids = marked_processes(MARK, mark)
        assert len(pids) == 2
        assert server.usage().resident_bytes >= usage(pids[:1]).resident_bytes
    assert marked_processes(MARK, mark) == []


def test_each_request_begins_at_the_next_photo() -> None:
    assert grouped("abc", 2) == [["a", "b"], ["b", "c"], ["c", "a"]]
    assert grouped([1], 3) == [[1, 1, 1]]
