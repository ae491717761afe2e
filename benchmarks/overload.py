"""Goodput of a server that is offered more than it can do: `python -m benchmarks.overload`.

Measures the capacity of `vitrail serve` with one demo model by a closed loop, then offers 1, 1.5, 3
and 10 times as many photos a second in an open loop, with deadlines of 0.5, 2 and 60 seconds.
Prints a row for each: goodput (answers in time) as a share of the capacity, the latency of what was
answered, and what became of the rest. `--full` takes five minutes for each row instead of 8 s.

The load generator is a process on the same machine. Its own processor time, which the server then
lacks, is in the column `load`; `others` is what the machine's other processes took, which should be
next to nothing. All are in cores. `lag` is how late 99 % of the requests were sent at most; it is
in the latencies.

Refusing takes time, too. What one refusal costs is measured first, with requests whose deadline
nothing can meet. `of what is left` is goodput as a share of the capacity less what the refusals of
the row and the generator's further work took.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.bodies import image_or_form
from benchmarks.load import Load, build_requests, percentile
from benchmarks.load_process import LoadProcess
from benchmarks.photos import jpegs
from benchmarks.processes import machine_cpu_s
from benchmarks.servers import Server, demo_server, free_port

CONNECTIONS = 32
CAPACITY_S = 10.0
HOPELESS_MS = 1  # no deadline that anything meets
FULL_S = 300.0
COLUMNS = (
    "offered", "deadline", "goodput", "of capacity", "of left", "p50", "p99", "200", "429", "504",
    "other", "unanswered", "lag", "load", "server", "others", "memory",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--factors", default="1,1.5,3,10", help="of the capacity")
    parser.add_argument("--deadlines", default="0.5,2,60", help="in seconds")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each row")
    parser.add_argument("--full", action="store_true", help=f"{FULL_S:g} seconds for each row")
    arguments = parser.parse_args()
    seconds = FULL_S if arguments.full else arguments.seconds
    with LoadProcess() as generator, demo_server(free_port(), arguments.model) as server:
        full = capacity(generator, server, arguments.model)
        if not full.rate:
            raise SystemExit("the server answered nothing")
        print(
            f"capacity: {full.rate:.1f} photos a second, "
            f"{1000 * full.refusal_cpu_s:.2f} ms of processor time for a refusal",
            flush=True,
        )
        print(row(COLUMNS), flush=True)
        for deadline in numbers(arguments.deadlines):
            requests = photos(arguments.model, deadline)
            for factor in numbers(arguments.factors):
                before, busy_s = server.usage(), machine_cpu_s()
                load = generator.open(server.port, requests, factor * full.rate, seconds)
                after, busy_s = server.usage(), machine_cpu_s() - busy_s
                server_s = after.cpu_s - before.cpu_s
                print(
                    row(
                        (
                            *cells(load, factor, deadline, full, seconds),
                            *cores(load, server_s, busy_s, seconds),
                            f"{after.resident_bytes / 2**20:.0f} MiB",
                        )
                    ),
                    flush=True,
                )


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a server can do that has 32 requests at a time.

    Args:
        rate: photos a second.
        server_cores, load_cores: what the server and the load generator take of the processor then.
        refusal_cpu_s: the server's processor time for one refusal, in seconds.
    """

    rate: float
    server_cores: float
    load_cores: float
    refusal_cpu_s: float

    def left(self, refusals: float, load_cores: float) -> float:
        """Photos a second beside `refusals` a second and a generator that takes `load_cores`; not
        above 0 if these take all."""
        taken = refusals * self.refusal_cpu_s + load_cores - self.load_cores
        return self.rate * (1 - taken / self.server_cores) if self.server_cores else 0.0


def capacity(generator: LoadProcess, server: Server, model: str) -> Capacity:
    generator.closed(server.port, photos(model), CONNECTIONS, CAPACITY_S / 2)
    before = server.usage()
    load = generator.closed(server.port, photos(model), CONNECTIONS, CAPACITY_S)
    server_s = server.usage().cpu_s - before.cpu_s
    before = server.usage()
    hopeless = photos(model, HOPELESS_MS / 1000)
    refused = generator.closed(server.port, hopeless, CONNECTIONS, CAPACITY_S / 2)
    refusing_s = server.usage().cpu_s - before.cpu_s
    return Capacity(
        load.rate,
        server_s / CAPACITY_S,
        load.cpu_s / CAPACITY_S,
        refusing_s / max(1, refused.statuses.total()),
    )


def photos(model: str, deadline: float | None = None) -> list[bytes]:
    """Requests to classify a photo each.

    Args:
        deadline: in seconds.
    """
    header = "" if deadline is None else f"X-Timeout-Ms: {1000 * deadline:g}\r\n"
    bodies = [image_or_form([jpeg]) for jpeg in jpegs()]
    return build_requests(f"/classify?model={model}", bodies, header)


def cells(
    load: Load, factor: float, deadline: float, full: Capacity, seconds: float
) -> Iterator[str]:
    """One row of the table."""
    span = max(seconds, load.span)
    in_time = sum(latency <= deadline for latency in load.latencies)
    goodput = in_time / span
    statuses = load.statuses
    refused = statuses.total() - statuses[0] - statuses[200]
    yield f"{factor:g}x"
    yield f"{deadline:g} s"
    yield f"{goodput:.1f}/s"
    yield share(goodput, full.rate)
    yield share(goodput, full.left(refused / span, load.cpu_s / span))
    yield f"{1000 * percentile(load.latencies, 0.5):.0f} ms"
    yield f"{1000 * percentile(load.latencies, 0.99):.0f} ms"
    for status in (200, 429, 504):
        yield str(statuses[status])
    yield str(statuses.total() - sum(statuses[status] for status in (0, 200, 429, 504)))
    yield str(statuses[0])
    yield f"{1000 * percentile(load.lags, 0.99):.0f} ms"


def share(goodput: float, rate: float) -> str:
    """Percent of a rate, if there is any."""
    return f"{100 * goodput / rate:.0f} %" if rate > 0 else "-"


def cores(load: Load, server_s: float, busy_s: float, seconds: float) -> Iterator[str]:
    """The cores that the load generator, the server and all other processes took.

    Args:
        server_s, busy_s: seconds of processor time of the server, and of the whole machine.
    """
    for cpu_s in (load.cpu_s, server_s, busy_s - server_s - load.cpu_s):
        yield f"{cpu_s / max(seconds, load.span):.2f}"


def row(values: Sequence[str] | Iterator[str]) -> str:
    return " ".join(f"{value:>11}" for value in values)


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
