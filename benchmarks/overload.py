"""Goodput of a server that is offered more than it can do: `python -m benchmarks.overload`.

Measures the capacity of `vitrail serve` with one demo model by a closed loop, then offers 1, 1.5, 3
and 10 times as many photos a second in an open loop, with deadlines of 0.5, 2 and 60 seconds.
Prints a row for each: goodput (answers in time) as a share of the capacity, the latency of what was
answered, and what became of the rest. `--full` takes five minutes for each row instead of 8 s.

The load generator is a process on the same machine. Its own processor time, which the server then
lacks, is in the column `load`; `others` is what the machine's other processes took, which should be
next to nothing. All are in cores.
"""

import argparse
from collections.abc import Iterator, Sequence

from benchmarks.bodies import image_or_form
from benchmarks.load import Load, build_requests, percentile
from benchmarks.load_process import LoadProcess
from benchmarks.photos import jpegs
from benchmarks.processes import machine_cpu_s
from benchmarks.servers import Server, demo_server, free_port

CONNECTIONS = 32
CAPACITY_S = 10.0
FULL_S = 300.0
COLUMNS = (
    "offered", "deadline", "goodput", "of capacity", "p50", "p99", "200", "429", "504", "other",
    "unanswered", "load", "server", "others", "memory",
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
        rate = capacity(generator, server, arguments.model)
        print(f"capacity: {rate:.1f} photos a second", flush=True)
        print(row(COLUMNS), flush=True)
        for deadline in numbers(arguments.deadlines):
            requests = build_requests(
                f"/classify?model={arguments.model}",
                [image_or_form([jpeg]) for jpeg in jpegs()],
                f"X-Timeout-Ms: {1000 * deadline:g}\r\n",
            )
            for factor in numbers(arguments.factors):
                before, busy_s = server.usage(), machine_cpu_s()
                load = generator.open(server.port, requests, factor * rate, seconds)
                after, busy_s = server.usage(), machine_cpu_s() - busy_s
                server_s = after.cpu_s - before.cpu_s
                print(
                    row(
                        (
                            *cells(load, factor, deadline, rate, seconds),
                            *cores(load, server_s, busy_s, seconds),
                            f"{after.resident_bytes / 2**20:.0f} MiB",
                        )
                    ),
                    flush=True,
                )


def capacity(generator: LoadProcess, server: Server, model: str) -> float:
    """Photos a second in a closed loop."""
    requests = build_requests(
        f"/classify?model={model}", [image_or_form([jpeg]) for jpeg in jpegs()]
    )
    generator.closed(server.port, requests, CONNECTIONS, CAPACITY_S / 2)
    return generator.closed(server.port, requests, CONNECTIONS, CAPACITY_S).rate


def cells(load: Load, factor: float, deadline: float, rate: float, seconds: float) -> Iterator[str]:
    """One row of the table.

    Args:
        rate: the capacity, in photos a second.
    """
    in_time = sum(latency <= deadline for latency in load.latencies)
    goodput = in_time / max(seconds, load.span)
    yield f"{factor:g}x"
    yield f"{deadline:g} s"
    yield f"{goodput:.1f}/s"
    yield f"{100 * goodput / rate:.0f} %"
    yield f"{1000 * percentile(load.latencies, 0.5):.0f} ms"
    yield f"{1000 * percentile(load.latencies, 0.99):.0f} ms"
    statuses = load.statuses
    for status in (200, 429, 504):
        yield str(statuses[status])
    yield str(statuses.total() - sum(statuses[status] for status in (0, 200, 429, 504)))
    yield str(statuses[0])


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
