"""Faults in real processes under load: `python -m benchmarks.chaos`, or `make chaos`.

Starts `vitrail serve --workers 2 --processes 2`, sends photos without pause, and injects one fault
after the other: SIGKILL and SIGSTOP of a worker, a gateway, a decoder and the supervisor. Prints a
row for each: what was answered meanwhile, what was lost, the worst time of `/healthz`, the time
until everything ran again, and the memory. Exits with 1 if a request was lost.

A request counts as lost if it got no answer, or another one than 200. Connections that a killed or
stopped gateway held are in a column of their own: nobody else could answer them.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.photos import jpegs
from benchmarks.processes import marked_processes
from benchmarks.servers import MARK, Server, demo_server, free_port

WORKERS, GATEWAYS = 2, 2
CLIENTS = 4
# Load before a fault, and after everything runs again.
CALM_S = 2.0
RECOVERY_S = 120.0
PAUSED_S = 3.0
KINDS = {
    "worker": "service.cli worker",
    "gateway": "service.cli gateway",
    "decoder": "service.decoding.decoder",
    "supervisor": "service.cli serve",
}
FAULTS = {
    "worker killed": ("worker", signal.SIGKILL),
    "worker stopped": ("worker", signal.SIGSTOP),
    "decoder killed": ("decoder", signal.SIGKILL),
    "decoder stopped": ("decoder", signal.SIGSTOP),
    "supervisor stopped": ("supervisor", signal.SIGSTOP),
    "gateway killed": ("gateway", signal.SIGKILL),
    "gateway stopped": ("gateway", signal.SIGSTOP),
}
COLUMNS = ("fault", "answered", "lost", "cut off", "healthz", "again after", "memory")


@dataclass
class Clients:
    """Threads that send photos without pause, and one that asks for `/healthz`."""

    url: str
    model: str
    answered: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    cut_off: int = 0
    slowest_s: float = 0.0
    # Whether connections end with the process that the current fault is about.
    cuts: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which they run."""
        threads = [threading.Thread(target=self._send, args=(n,)) for n in range(CLIENTS)]
        threads.append(threading.Thread(target=self._check))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _send(self, number: int) -> None:
        photos = jpegs()
        while not self._stop.is_set():
            with httpx.Client(base_url=self.url, timeout=60) as client:
                try:
                    while not self._stop.is_set():
                        response = client.post(
                            "/classify",
                            params={"model": self.model},
                            content=photos[number % len(photos)],
                        )
                        with self._lock:
                            if response.status_code == 200:
                                self.answered += 1
                            else:
                                self.lost[str(response.status_code)] += 1
                except httpx.TransportError as error:
                    with self._lock:
                        if self.cuts:
                            self.cut_off += 1
                        else:
                            self.lost[type(error).__name__] += 1

    def _check(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                httpx.get(f"{self.url}/healthz", timeout=60)
            except httpx.TransportError:
                continue  # counted by the others
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--catalog", default="demo")
    parser.add_argument("--faults", default=",".join(FAULTS), help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=1, help="of all faults")
    arguments = parser.parse_args()
    flags = ["--workers", str(WORKERS), "--processes", str(GATEWAYS)]
    flags += ["--catalog", arguments.catalog]
    # All photos are decoded in processes, so that these have work when they are killed.
    os.environ["VITRAIL_DECODERS"] = "processes"
    port = free_port()
    print(_row(COLUMNS), flush=True)
    with demo_server(port, arguments.model, *flags) as server:
        _wait(lambda: _is_whole(server))
        clients = Clients(f"http://127.0.0.1:{port}", arguments.model)
        with clients.running():
            time.sleep(CALM_S)
            _report("none", clients, server, 0.0)
            for name in arguments.faults.split(",") * arguments.rounds:
                _inject(name, clients, server)
    lost = sum(clients.lost.values())
    print(f"{clients.answered} answered, {lost} lost {dict(clients.lost) or ''}", flush=True)
    sys.exit(1 if lost else 0)


def _inject(name: str, clients: Clients, server: Server) -> None:
    kind, number = FAULTS[name]
    before = clients.answered, sum(clients.lost.values()), clients.cut_off
    clients.slowest_s, clients.cuts = 0.0, kind == "gateway"
    victim = _pids(server, kind)[0]
    started = time.monotonic()
    os.kill(victim, number)
    if kind == "supervisor":
        time.sleep(PAUSED_S)
        os.kill(victim, signal.SIGCONT)
    else:
        _wait(lambda: victim not in _pids(server, kind) and _is_whole(server))
    again_s = time.monotonic() - started
    time.sleep(CALM_S)
    _report(name, clients, server, again_s, before)
    clients.cuts = False


def _report(
    name: str,
    clients: Clients,
    server: Server,
    again_s: float,
    before: tuple[int, int, int] = (0, 0, 0),
) -> None:
    answered, lost, cut_off = before
    columns = (
        name,
        str(clients.answered - answered),
        str(sum(clients.lost.values()) - lost),
        str(clients.cut_off - cut_off),
        f"{1000 * clients.slowest_s:.0f} ms",
        f"{again_s:.1f} s",
        f"{server.usage().resident_bytes / 2**20:.0f} MiB",
    )
    print(_row(columns), flush=True)


def _is_whole(server: Server) -> bool:
    """Whether all processes run, and the gateways reach all workers."""
    if len(_pids(server, "worker")) < WORKERS or len(_pids(server, "gateway")) < GATEWAYS:
        return False
    try:
        answer = httpx.get(f"http://127.0.0.1:{server.port}/readyz", timeout=10).json()
    except (httpx.TransportError, ValueError):
        return False
    return bool(answer["status"] == "ready")


def _pids(server: Server, kind: str) -> list[int]:
    found = []
    for pid in marked_processes(MARK, server.mark):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if KINDS[kind] in command:
            found.append(pid)
    return found


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + RECOVERY_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not everything ran again within {RECOVERY_S:g} s")
        time.sleep(0.1)


def _row(columns: Sequence[str]) -> str:
    return f"{columns[0]:20}" + "".join(f"{column:>13}" for column in columns[1:])


if __name__ == "__main__":
    main()
