"""The faults, in the order in which they are injected.

Each is a function that injects it and returns once everything runs again. It raises AssertionError
where the server answers otherwise than it should.
"""

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from benchmarks.chaos.clients import Clients
from benchmarks.chaos.target import BODY_TIMEOUT_S, LOG, Target, wait_until
from benchmarks.photos import jpegs
from benchmarks.servers import demo_server, free_port

# How long a fault lasts that does not end by itself.
FAULT_S = 3.0
SILENT_CLIENTS = 20
POISONOUS = 8


class SkippedError(Exception):
    """This fault cannot be injected here."""


@dataclass(frozen=True, slots=True)
class Fault:
    """
    Args:
        inject: see the module.
        cuts: whether connections end with the process that the fault is about.
        refuses: whether it leaves no worker for a while.
    """

    inject: Callable[[Target], None]
    cuts: bool = False
    refuses: bool = False


def killed(kind: str, target: Target) -> None:
    target.replaced(kind, signal.SIGKILL)


def stopped(kind: str, target: Target) -> None:
    """Nobody but the server itself ends what hangs."""
    target.replaced(kind, signal.SIGSTOP)


def decoders_stopped(target: Target) -> None:
    """Those that get an image are replaced; others may never get one."""
    victims = target.pids("decoder")
    for victim in victims:
        os.kill(victim, signal.SIGSTOP)
    wait_until(lambda: not set(victims) <= set(target.pids("decoder")))
    for victim in set(victims) & set(target.pids("decoder")):
        os.kill(victim, signal.SIGCONT)


def worker_slows_down(target: Target) -> None:
    """It runs for a tenth of the time."""
    victim = target.pids("worker")[0]
    end = time.monotonic() + FAULT_S
    while time.monotonic() < end:
        os.kill(victim, signal.SIGSTOP)
        time.sleep(0.18)
        os.kill(victim, signal.SIGCONT)
        time.sleep(0.02)


def workers_killed(target: Target) -> None:
    for victim in target.pids("worker"):
        os.kill(victim, signal.SIGKILL)
    target.wait_whole()


def workers_restarted(target: Target) -> None:
    """One by one."""
    before = set(target.pids("worker"))
    os.kill(target.pids("supervisor")[0], signal.SIGUSR1)
    wait_until(lambda: not before & set(target.pids("worker")))
    target.wait_whole()


def supervisor_stopped(target: Target) -> None:
    [victim] = target.pids("supervisor")
    os.kill(victim, signal.SIGSTOP)
    time.sleep(FAULT_S)
    os.kill(victim, signal.SIGCONT)
    target.wait_whole()


def supervisor_killed(target: Target) -> None:
    """Its children answer what they have accepted and end. An init starts it again."""
    [victim] = target.pids("supervisor")
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not any(map(target.pids, ("supervisor", "gateway", "worker", "decoder"))))
    target.start()


def poisoned(fault: str, expected: int, target: Target) -> None:
    """Images for which a pass fails get an error of their own, and those beside them none."""
    poison = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(poison, "PNG")
    statuses: list[int] = []

    def ask() -> None:
        path = f"/classify?model={target.model}"
        statuses.append(target.ask("POST", path, content=poison.getvalue()))

    with target.fault(fault):
        threads = [threading.Thread(target=ask) for _ in range(POISONOUS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [expected] * POISONOUS, statuses
    target.wait_whole()


def worker_killed_by_request(target: Target) -> None:
    """It is sent to a second worker, and then refused."""
    poison = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(poison, "PNG")
    with target.fault("kill"):
        path = f"/classify?model={target.model}"
        status = target.ask("POST", path, content=poison.getvalue())
    assert status == 503, status
    target.wait_whole()


def out_of_memory(target: Target) -> None:
    with target.fault("memory"):
        time.sleep(FAULT_S)


def disk_full(target: Target) -> None:
    """Heads and collections refuse; a worker that is killed meanwhile comes back."""
    if not target.disk.is_mount():
        raise SkippedError("this process may not mount a file system")
    collection = "/collections/chaos"
    assert target.ask("PUT", collection, json={"model": target.embedding}) in (200, 201)
    filler = target.disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    try:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as content:
            for number in range(16):
                content.writestr(f"{number % 2}/{number}.jpg", jpegs()[number % 4])
        statuses = {
            "head": target.ask(
                "POST", "/heads", files={"archive": archive.getvalue()},
                data={"name": "chaos", "trunk": target.model},
            ),
            "image": target.ask("POST", f"{collection}/images", content=jpegs()[0]),
        }  # fmt: skip
        assert set(statuses.values()) == {507}, statuses
        killed("worker", target)
    finally:
        filler.unlink()
    assert target.ask("POST", f"{collection}/images", content=jpegs()[0]) == 200
    assert target.ask("DELETE", collection) == 204


def cache_damaged(target: Target) -> None:
    """All downloaded and compiled files are damaged, and a worker is killed."""
    for path in target.store.rglob("*"):
        if path.is_file() and path.suffix not in (".lock", ".sha256"):
            with path.open("rb") as file:
                damaged = bytearray(file.read(1024))
            damaged[100:200] = bytes(100)
            path.with_suffix(".damaged").write_bytes(damaged)
            path.with_suffix(".damaged").replace(path)
    killed("worker", target)


def catalog_damaged(target: Target) -> None:
    """A worker that is killed meanwhile comes back when the file is mended."""
    content = target.catalog.read_text()
    target.catalog.write_text("[models.broken\n")
    try:
        victim = target.pids("worker")[0]
        os.kill(victim, signal.SIGKILL)
        time.sleep(2 * FAULT_S)
    finally:
        target.catalog.write_text(content)
    target.wait_whole()


def head_damaged(target: Target) -> None:
    """A worker that is killed serves everything else."""
    damaged = target.disk / "heads" / "damaged.safetensors"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(b"\xff" * 1000)
    try:
        killed("worker", target)
        assert target.ask("GET", "/heads/damaged") == 200
    finally:
        damaged.unlink()


def models_reloaded(target: Target) -> None:
    """A model on the trunk that others use is unloaded and loaded."""
    for _ in range(4):
        for action in ("unload", "load"):
            assert target.ask("POST", f"/models/{target.embedding}/{action}") == 200
    target.wait_whole()


def port_taken(target: Target) -> None:
    """Another server on the same port, or with the same port for gRPC, ends with an error."""
    for port, grpc_port in ((target.port, free_port()), (free_port(), target.grpc_port)):
        command = [sys.executable, "-m", "service.cli", "serve", "--workers", "1"]
        command += ["--port", str(port), "--grpc-port", str(grpc_port)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as other:
            try:
                assert other.wait(60) != 0
            except subprocess.TimeoutExpired:
                other.terminate()
                raise AssertionError(f"a second server runs on {port}, {grpc_port}") from None


def clock_jumps(target: Target) -> None:
    """A day forward and back, on a server of its own: the library that changes its clock is loaded
    when it starts."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        raise SkippedError("libfaketime is not installed")
    clock = target.catalog.with_name("clock")
    clock.write_text("+0")
    environment = {
        **target.environment,
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # which does not jump
        "FAKETIME_DISABLE_SHM": "1",
    }
    flags = ["--workers", "1", "--catalog", str(target.catalog)]
    port = free_port()
    with demo_server(port, target.model, *flags, environment=environment, log=LOG):
        clients = Clients(port, target.model)
        with clients.running():
            for offset in ("+0", "+100000", "-100000", "+0"):
                clock.write_text(offset)
                time.sleep(FAULT_S)
    assert clients.counts.answered, "nothing was answered"
    assert not clients.counts.lost, clients.counts.lost


def clients_never_read(target: Target) -> None:
    """They send requests with large answers without end."""
    asking = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400
    with ExitStack() as stack:
        clients = []
        for _ in range(SILENT_CLIENTS):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", target.port)))
            client.sendall(asking)
            clients.append(client)
        time.sleep(BODY_TIMEOUT_S + FAULT_S)
        for client in clients:
            _assert_cut(client)


def _assert_cut(client: socket.socket) -> None:
    client.settimeout(10)
    try:
        while client.send(b"\r\n"):
            time.sleep(0.01)
    except ConnectionError:
        return
    except TimeoutError as error:
        raise AssertionError("a client that never reads is not cut") from error


FAULTS = {
    "worker killed": Fault(partial(killed, "worker")),
    "worker stopped": Fault(partial(stopped, "worker")),
    "worker slows down": Fault(worker_slows_down),
    "all workers killed": Fault(workers_killed, refuses=True),
    "request kills worker": Fault(worker_killed_by_request, refuses=True),
    "pass raises": Fault(partial(poisoned, "raise", 500)),
    "outputs not finite": Fault(partial(poisoned, "nan", 500)),
    "out of memory": Fault(out_of_memory),
    "decoder killed": Fault(partial(killed, "decoder")),
    "decoders stopped": Fault(decoders_stopped),
    "gateway killed": Fault(partial(killed, "gateway"), cuts=True),
    "gateway stopped": Fault(partial(stopped, "gateway"), cuts=True),
    "supervisor stopped": Fault(supervisor_stopped),
    "disk full": Fault(disk_full),
    "cache damaged": Fault(cache_damaged),
    "catalog damaged": Fault(catalog_damaged),
    "head damaged": Fault(head_damaged),
    "workers restarted": Fault(workers_restarted),
    "models reloaded": Fault(models_reloaded),
    "port taken": Fault(port_taken),
    "clock jumps": Fault(clock_jumps),
    "clients never read": Fault(clients_never_read),
    "supervisor killed": Fault(supervisor_killed, cuts=True, refuses=True),
}
