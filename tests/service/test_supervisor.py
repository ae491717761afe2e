"""`vitrail serve --workers N`: one roof, no orphans, nothing lost in a rolling restart."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from service.processes import heartbeat
from service.processes.heartbeat import (
    BEAT,
    LOADING_BEAT,
    LOADING_SILENCE_S,
    LOOK_S,
    SILENCE_S,
)
from service.processes.run_folder import LOCK, run_folder
from service.processes.supervisor import _Supervisor
from service.settings import Settings
from service.types import Health
from tests.conftest import PLAIN, answers, free_port, process, wait_until
from tests.service.test_remote import load, more, post

START_S = 120

# The URL, and the supervisor.
Supervised = tuple[str, "subprocess.Popen[bytes]"]


@contextmanager
def supervised(catalog: Path, workers: int, *flags: str) -> Iterator[Supervised]:
    """`vitrail serve`, ready, with so many workers."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = ["serve", "--workers", str(workers), "--catalog", str(catalog), "--device", "cpu"]
    arguments += ["--port", str(port), "--grpc-port", str(free_port()), "--log-level", "warning"]
    with process(*arguments, *flags) as started:
        wait_until(lambda: answers(f"{url}/readyz") or started.poll() is not None, START_S)
        assert started.poll() is None
        wait_until(lambda: healthy(url) == workers, START_S)
        children = descendants(started.pid)
        try:
            yield url, started
        finally:
            started.terminate()
            started.wait(60)
            wait_until(lambda: not alive(children))


@pytest.fixture(scope="module")
def served(tiny_catalog: Path) -> Iterator[Supervised]:
    """Two workers and two gateways, which tests kill and the supervisor starts again."""
    with supervised(tiny_catalog, 2, "--processes", "2") as served:
        yield served


def healthy(url: str) -> int:
    """How many workers are up and ready, by the gateway's word; none if its connection breaks.

    While all gateways start, the connection waits for the first that has.
    """
    try:
        reasons = httpx.get(f"{url}/readyz", timeout=60, verify=PLAIN).json()["reasons"]
        up = re.findall(r"^vitrail_gateway_worker_up\{.*\} 1\.0$", metrics(url), re.MULTILINE)
    except httpx.HTTPError:
        return 0
    return len(up) if not reasons else 0


def metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics", timeout=60, verify=PLAIN).text


def pids(supervisor: "subprocess.Popen[bytes]", kind: str) -> set[int]:
    """Its workers, or its gateways."""
    return {pid for pid in descendants(supervisor.pid) if f" {kind} " in command(pid)}


def descendants(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]


def command(pid: int) -> str:
    """Its command line; empty if it has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except FileNotFoundError:
        return ""


def alive(pids: list[int]) -> list[int]:
    """Those that still run; a zombie, whose new parent has not looked yet, does not."""
    found = []
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        try:
            if "State:\tZ" not in status.read_text():
                found.append(pid)
        except FileNotFoundError:
            pass
    return found


@pytest.mark.parametrize("gpu", [None, "1"])
def test_a_worker_knows_that_its_gpu_was_assigned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str | None
) -> None:
    """It may start again if that GPU is not there, while others serve."""
    gpus = "service.processes.supervisor.assigned_gpus"
    monkeypatch.setattr(gpus, lambda settings, count: [gpu] * count)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = _Supervisor(Settings(), tmp_path, 0, listener, 1, 1, False)
    [worker] = made._workers
    assert ("--assigned-gpu" in worker._arguments) is (gpu is not None)
    assert gpu is None or worker._environment["CUDA_VISIBLE_DEVICES"] == gpu


def test_workers_restart_one_by_one_and_after_a_crash_and_nothing_fails(
    served: Supervised, jpegs: dict[str, bytes]
) -> None:
    url, supervisor = served
    before = pids(supervisor, "worker")
    assert len(before) == 2
    with load(url, jpegs["coffee"]) as made:
        more(made, 20)
        supervisor.send_signal(signal.SIGUSR1)

        def all_new() -> bool:
            now = pids(supervisor, "worker")
            return len(now) == 2 and not now & before

        wait_until(all_new, START_S)
        wait_until(lambda: healthy(url) == 2, START_S)
        more(made, 20)
        os.kill(min(pids(supervisor, "worker")), signal.SIGKILL)
        more(made, 50)
        wait_until(lambda: healthy(url) == 2, START_S)
        more(made, 20)
    assert made.statuses.keys() == {200}, made.failures


def test_what_hangs_is_replaced_and_nothing_fails(
    served: Supervised, jpegs: dict[str, bytes]
) -> None:
    """A worker that is stopped, then both gateways; no hand but the supervisor's helps."""
    url, supervisor = served
    with load(url, jpegs["coffee"]) as made:
        more(made, 20)
        hung = min(pids(supervisor, "worker"))
        os.kill(hung, signal.SIGSTOP)
        wait_until(lambda: hung not in pids(supervisor, "worker"))
        wait_until(lambda: healthy(url) == 2, START_S)
        more(made, 20)
    assert made.statuses.keys() == {200}, made.failures
    stopped = pids(supervisor, "gateway")
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: len(pids(supervisor, "gateway") - stopped) == 2)
    wait_until(lambda: healthy(url) == 2, START_S)
    with httpx.Client(base_url=url, verify=PLAIN) as client:
        assert post(client, "/classify", jpegs["coffee"]).status_code == 200


@pytest.mark.parametrize("beat", [BEAT, LOADING_BEAT])
def test_silence_is_counted_in_looks_from_the_first_beat(
    beat: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = 0

    async def sleep(_: float) -> None:
        nonlocal slept
        slept += 1
        if slept == 1000:  # so long it takes to start; a beat then, and another
            os.write(watch.write, BEAT)
        if slept == 1010:
            os.write(watch.write, beat)

    # not asyncio's own `sleep`, which servers in this process call meanwhile
    monkeypatch.setattr("service.processes.heartbeat.asyncio", SimpleNamespace(sleep=sleep))
    watch = heartbeat.Watch()
    limit = LOADING_SILENCE_S if beat == LOADING_BEAT else SILENCE_S
    assert asyncio.run(watch.silence()) == limit
    assert slept == 1010 + limit / LOOK_S
    watch.close_write()
    watch.close()


def test_a_process_that_is_not_live_falls_silent() -> None:
    class Backend:
        live = True

        def health(self) -> Health:
            return Health(self.live, self.live, ())

    async def beats(backend: Any) -> bytes:
        async with heartbeat.beating(watch.write, backend, loads=False):
            await asyncio.sleep(0)
            return os.read(watch._read, 10)

    watch = heartbeat.Watch()
    backend = Backend()
    assert asyncio.run(beats(backend)) == BEAT
    backend.live = False
    with pytest.raises(BlockingIOError):
        asyncio.run(beats(backend))
    watch.close_write()
    watch.close()


def test_several_gateways_share_a_port_and_count_as_one(
    served: Supervised, jpegs: dict[str, bytes]
) -> None:
    url, supervisor = served

    def total(name: str, outcome: str = "") -> float:
        pattern = rf"^vitrail_{name}(?:\{{.*{outcome}.*\}})? (.+)$"
        return sum(map(float, re.findall(pattern, metrics(url), re.MULTILINE)))

    def counted() -> list[float]:
        answered = [total(f"{name}_total", 'outcome="ok"') for name in ("requests", "images")]
        return [*answered, total("batch_size_sum")]

    gateways = pids(supervisor, "gateway")
    assert len(gateways) == 2
    wait_until(lambda: total("worker_up") == 2)
    before = counted()
    for _ in range(40):  # each on a connection of its own, so that both gateways get some
        with httpx.Client(base_url=url, verify=PLAIN) as client:
            assert post(client, "/classify", jpegs["coffee"]).status_code == 200
    after = [count + 40 for count in before]
    assert counted() == after
    os.kill(min(gateways), signal.SIGKILL)
    wait_until(lambda: len(pids(supervisor, "gateway") - {min(gateways)}) == 2)
    wait_until(lambda: counted() == after)  # what the dead one counted stays


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_everything_after_the_accepted_is_answered(
    tiny_catalog: Path, jpegs: dict[str, bytes], number: signal.Signals
) -> None:
    with supervised(tiny_catalog, 1) as (url, supervisor):
        children = descendants(supervisor.pid)
        assert len(children) == 2
        [folder, *_] = re.findall(r" unix:(\S+)/worker", " ".join(map(command, children)))
        assert Path(folder).exists()
        with load(url, jpegs["coffee"], clients=3) as made:
            more(made, 10)
            made.stop.set()
            supervisor.send_signal(number)
        assert made.statuses.keys() == {200}, made.failures
        assert supervisor.wait(60) == (-number if number == signal.SIGKILL else 0)
        wait_until(lambda: alive(children) == [])
    if number != signal.SIGKILL:  # otherwise any supervisor that starts meanwhile may remove it
        assert not Path(folder).exists()

    def is_cleared() -> bool:
        with run_folder():  # as the next supervisor does
            return not Path(folder).exists()

    wait_until(is_cleared)  # the last of a child's threads holds the lock for a moment longer


def test_a_stopped_gateway_does_not_outlive_its_supervisor() -> None:
    port = free_port()
    arguments = ["gateway", "--workers", "127.0.0.1:1", "--processes", "2", "--port", str(port)]
    command = [sys.executable, "-m", "service.cli", *arguments]
    # in a session of its own, as from a shell or an init
    with subprocess.Popen(command, start_new_session=True) as supervisor:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/healthz"), START_S)
            gateways = descendants(supervisor.pid)
            assert len(gateways) == 2
            os.kill(gateways[0], signal.SIGSTOP)
        finally:
            supervisor.kill()
    wait_until(lambda: alive(gateways) == [])


def test_a_stopped_process_is_continued_when_its_supervisor_dies() -> None:
    """It is in this process's group, in which the kernel does nothing about stopped processes."""
    stopped = (
        "import os, signal, time\n"
        "from service.processes.parent_watch import end_with_parent\n"
        "end_with_parent(0, os.pipe()[1])\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
        "time.sleep(60)\n"
    )
    program = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stopped!r}], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        child = int(supervisor.stdout.readline())
        status = Path(f"/proc/{child}/status")
        wait_until(lambda: "State:\tT" in status.read_text())
        supervisor.kill()
    try:
        wait_until(lambda: alive([child]) == [])
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_worker_outlives_its_supervisor_no_longer_than_gateways_drain() -> None:
    """Its standard input is held by a gateway that hangs, here by this process."""
    program = (
        "import sys, time\n"
        "from service.processes import parent_watch\n"
        "parent_watch.GRACE_S = 0\n"
        "parent_watch.end_with_parent(0.1, int(sys.argv[1]))\n"
        "time.sleep(60)\n"
    )
    read, write = os.pipe()
    command = [sys.executable, "-c", program, str(write)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[write]) as worker:
        os.close(write)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(0.5)
        os.close(read)
        assert worker.wait(30) == -signal.SIGTERM


def test_only_folders_that_nobody_holds_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stale, others = tmp_path / "vitrail-run-a", tmp_path / "vitrail-run-b"
    stale.mkdir()
    (stale / LOCK).touch()
    others.mkdir()  # without a lock it is no supervisor's
    with run_folder() as (first, _), run_folder() as (second, _):
        assert set(tmp_path.iterdir()) == {others, first, second}
    assert list(tmp_path.iterdir()) == [others]


def test_a_wrong_catalog_ends_the_supervisor_with_a_line(tmp_path: Path) -> None:
    with process("serve", "--workers", "1", "--catalog", str(tmp_path / "none.toml"),
                 "--port", "0", "--grpc-port", str(free_port())) as started:  # fmt: skip
        assert started.wait(60) == 2


def test_no_leftovers_in_the_temporary_folder(tiny_catalog: Path, tmp_path: Path) -> None:
    environment = {"TMPDIR": str(tmp_path)}
    with process("serve", "--workers", "1", "--catalog", str(tiny_catalog), "--port", "0",
                 "--grpc-port", str(free_port()), **environment) as started:  # fmt: skip
        wait_until(lambda: len(list(tmp_path.glob("vitrail-*/worker-0.sock"))) == 1, START_S)
        time.sleep(0.2)
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
    assert list(tmp_path.iterdir()) == []
