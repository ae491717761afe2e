"""Faults in real processes under load: `python -m benchmarks.chaos`, or `make chaos`.

Starts `vitrail serve --workers 2 --processes 2`, sends photos without pause, and injects one fault
after the other (`faults/`). Prints a row for each: what was answered meanwhile, what was lost,
the worst time of `/healthz`, the time until everything ran again, and the memory. A summary
follows; its worst `/healthz` leaves out the one fault that stops all processes. Exits with 1 if a
request was lost or a fault was not survived.

A request counts as lost if it got no answer, or another one than 200. Two columns are apart: *cut
off* are connections that a killed or stopped process held, which nobody else could answer, and
*refused* are answers of 503 with `Retry-After` while a fault had left no worker.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import httpx

from benchmarks.chaos.clients import CLIENTS, Clients, Counts, HealthWatch
from benchmarks.chaos.faults import FAULTS
from benchmarks.chaos.faults.fault import SkippedError
from benchmarks.chaos.hostile import try_images
from benchmarks.chaos.target import Target
from benchmarks.servers import StartError

# Load before a fault, and after everything runs again.
CALM_S = 2.0
FIRST_CALM_S = 5.0
COLUMNS = (
    "fault", "answered", "lost", "refused", "cut off", "healthz", "again after", "memory",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--catalog", default="demo", help="a name, or a TOML file")
    parser.add_argument("--faults", default=",".join(FAULTS), help="names, separated by commas")
    parser.add_argument("--rounds", type=int, default=1, help="of all faults")
    parser.add_argument("--images", type=int, default=1000, help="hostile ones to try")
    arguments = parser.parse_args()
    print(_row(COLUMNS), flush=True)
    with Target.started(arguments.catalog, arguments.model) as target:
        clients, health = Clients(target.port, arguments.model), HealthWatch(target.port)
        run = _Run(target, clients, health)
        with health.running(), clients.running():
            time.sleep(FIRST_CALM_S)
            held = clients.counts.answered / FIRST_CALM_S
            before = target.resident_bytes
            run.report("none", 0.0, Counts())
            for name in arguments.faults.split(",") * arguments.rounds:
                if not run.inject(name):
                    break
            tried = run.try_images(arguments.images)
        after = target.resident_bytes
    counts, faults = clients.counts, len(run.survived) + len(run.failed)
    lost = counts.lost.total()
    print()
    print(f"load held        {CLIENTS} clients, {held:.0f} photos a second before the first fault")
    print(f"faults survived  {len(run.survived)} of {faults}", *run.failed)
    print(f"inputs tried     {tried} hostile images, {counts.answered} photos")
    print(f"requests lost    {lost}", dict(counts.lost) or "")
    print(f"worst /healthz   {1000 * run.slowest_s:.0f} ms")
    print(f"memory           {_mib(before)} before, {_mib(after)} after", flush=True)
    sys.exit(1 if lost or run.failed else 0)


class _Run:
    """Injects faults, and prints a row for each.

    Attributes:
        survived, failed: names of faults.
        slowest_s: the worst time of `/healthz`, except where a fault stops all processes.
    """

    def __init__(self, target: Target, clients: Clients, health: HealthWatch) -> None:
        self._target, self._clients, self._health = target, clients, health
        self.survived: list[str] = []
        self.failed: list[str] = []
        self.slowest_s = 0.0

    def inject(self, name: str) -> bool:
        """Inject a fault, and wait until everything runs again.

        Returns:
            Whether it does.
        """
        fault, before = FAULTS[name], self._clients.counts.copy()
        self._clients.cuts, self._clients.refuses = fault.cuts, fault.refuses
        started = time.monotonic()
        try:
            fault.inject(self._target)
        except SkippedError as reason:
            print(f"{name:21} skipped: {reason}", flush=True)
            return True
        except (AssertionError, OSError, httpx.HTTPError, StartError) as error:
            self.failed.append(f"{name}: {error}")
            runs = not isinstance(error, TimeoutError)
        else:
            self.survived.append(name)
            runs = True
        again_s = time.monotonic() - started
        time.sleep(CALM_S)
        self.report(name, again_s, before, counts_health=not fault.stops_all)
        self._clients.cuts = self._clients.refuses = False
        return runs

    def try_images(self, count: int) -> int:
        """Send hostile images beside the load.

        Returns:
            How many were tried.
        """
        before, started = self._clients.counts.copy(), time.monotonic()
        try:
            tried = try_images(self._target.url, count)
        except (AssertionError, httpx.HTTPError) as error:
            self.failed.append(f"hostile images: {error}")
            tried = 0
        self.report("hostile images", time.monotonic() - started, before)
        return tried

    def report(
        self, name: str, again_s: float, before: Counts, *, counts_health: bool = True
    ) -> None:
        """Print a row."""
        counts, slowest_s = self._clients.counts.since(before), self._health.slowest_s()
        if counts_health:
            self.slowest_s = max(self.slowest_s, slowest_s)
        columns = (
            name,
            str(counts.answered),
            str(counts.lost.total()),
            str(counts.refused),
            str(counts.cut_off),
            f"{1000 * slowest_s:.0f} ms",
            f"{again_s:.1f} s",
            _mib(self._target.resident_bytes),
        )
        print(_row(columns), flush=True)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _row(columns: Sequence[str]) -> str:
    return f"{columns[0]:21}" + "".join(f"{column:>12}" for column in columns[1:])


if __name__ == "__main__":
    main()
