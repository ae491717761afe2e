"""Measures one case of a comparison: a fresh server under several loads, or a bare loop."""

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

from benchmarks.agreement import agreement
from benchmarks.bundle import Measurement
from benchmarks.candidates import CANDIDATES, Launcher
from benchmarks.load import build_requests
from benchmarks.load_process import LoadProcess
from benchmarks.processes import machine_cpu_s
from benchmarks.servers import Server, StartError
from benchmarks.workload import grouped

# A kind of load and its level, see `Measurement`.
Run = tuple[Literal["closed", "open"], int]
# For each request, for each of its images, the classes that are expected.
Classes = list[list[list[int]]]

BARE = "bare "  # before the engine's name


@dataclass(frozen=True, slots=True)
class Loads:
    """The loads of each server.

    Args:
        connections: of closed loops.
        percents: rates of open loops, in percent of the fastest bare loop's images per second.
        seconds: of each load, and of each arrangement of a bare loop.
        warm_s: seconds of load before the first one that counts.
    """

    connections: list[int]
    percents: list[int]
    seconds: float
    warm_s: float


@dataclass(frozen=True, slots=True)
class Case:
    """A server or a bare loop, with a model, in a round."""

    model: str
    server: str
    round: int

    @property
    def engine(self) -> str | None:
        """The engine of a bare loop; None for servers."""
        return self.server.removeprefix(BARE) if self.server.startswith(BARE) else None

    def __str__(self) -> str:
        return f"round {self.round + 1}, {self.model}, {self.server}"


class Measuring:
    """Measures cases one after the other.

    Args:
        order: draws the order of each server's loads.
    """

    def __init__(
        self, launcher: Launcher, generator: LoadProcess, loads: Loads, order: random.Random
    ) -> None:
        self._launcher = launcher
        self._generator = generator
        self._loads = loads
        self._order = order
        self._limits: dict[str, float] = {}  # images per second of the fastest bare loop, by model

    def measure(self, case: Case) -> list[Measurement]:
        """The measurements of a case, with processes of its own.

        Raises:
            StartError: the server or the bare loop did not start.
        """
        if case.engine is not None:
            return self._measure_bare(case, case.engine)
        with self._launcher.server(case.server, case.model) as server:
            return self._measure_server(case, server)

    def _measure_bare(self, case: Case, engine: str) -> list[Measurement]:
        launcher, setting = self._launcher, self._launcher.setting
        command = [
            sys.executable, "-m", "benchmarks.bare", "--catalog", str(launcher.workload.catalog),
            "--model", case.model, "--photos", str(launcher.workload.photo_folder),
            "--engine", engine, "--transform", setting.transform,
            "--precision", setting.precision, "--seconds", str(self._loads.seconds),
        ]  # fmt: skip
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise StartError(finished.stderr.strip().rpartition("\n")[2])
        rates: dict[str, float] = json.loads(finished.stdout)
        if case.round == 0:  # later rounds offer the same rates as the first one
            self._limits[case.model] = max(self._limits.get(case.model, 0.0), *rates.values())
        return [
            Measurement(
                model=case.model, server=case.server, round=case.round,
                kind="bare", level=name, images_per_s=rate,
            )
            for name, rate in rates.items()
        ]  # fmt: skip

    def _measure_server(self, case: Case, server: Server) -> list[Measurement]:
        loads, images = self._loads, self._launcher.setting.images
        candidate, workload = CANDIDATES[case.server], self._launcher.workload
        bodies = [candidate.encode(group) for group in grouped(workload.photos(), images)]
        requests = build_requests(candidate.path.format(model=case.model), bodies)
        expected = grouped(workload.expected(case.model), images)
        runs: list[Run] = [
            *(("closed", count) for count in loads.connections),
            *(("open", percent) for percent in loads.percents if case.model in self._limits),
        ]
        self._order.shuffle(runs)
        self._generator.closed(server.port, requests, max(loads.connections), loads.warm_s)
        return [self._measure_run(case, server, run, requests, expected) for run in runs]

    def _measure_run(
        self, case: Case, server: Server, run: Run, requests: list[bytes], expected: Classes
    ) -> Measurement:
        loads, images = self._loads, self._launcher.setting.images
        kind, level = run
        offered = level / 100 * self._limits[case.model] if kind == "open" else 0.0
        before, machine_s, start = server.usage(), machine_cpu_s(), time.monotonic()
        if kind == "closed":
            load = self._generator.closed(server.port, requests, level, loads.seconds)
        else:
            load = self._generator.open(server.port, requests, offered / images, loads.seconds)
        after = server.usage()
        server_s = after.cpu_s - before.cpu_s
        other_s = machine_cpu_s() - machine_s - server_s - load.cpu_s
        return Measurement(
            model=case.model, server=case.server, round=case.round, kind=kind, level=level,
            images_per_s=load.rate * images, offered_per_s=offered,
            latencies_ms=[round(1e3 * latency, 2) for latency in load.latencies],
            answered=load.answered, failures=load.failures,
            agreement=agreement(load.answers, expected),
            server_cpu_s=server_s, load_cpu_s=load.cpu_s,
            other_cores=max(0.0, other_s / (time.monotonic() - start)),
            resident_bytes=after.resident_bytes,
        )  # fmt: skip
