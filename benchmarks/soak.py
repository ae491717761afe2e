"""Memory under mixed load: `python -m benchmarks.soak [--minutes 20]`.

Starts `vitrail serve` with the demo catalog and sends requests of every task without pause: one
photo and eight, small photos and large ones, cut-off files, unknown models, and deadlines that
cannot be met. Prints a row for each minute: what was answered, and the memory of all processes.

The first minutes warm up: engines are tried, caches fill. The last row states how much the memory
grew from then on. Exits with 1 if that is more than `--tolerance`, or if a request got no answer
or a status of 500.
"""

import argparse
import sys
from collections import Counter

from benchmarks.bodies import Body, form, image_or_form
from benchmarks.load import build_requests
from benchmarks.load_process import LoadProcess
from benchmarks.photos import SIZES, encode, jpegs, photos
from benchmarks.servers import Server, free_port

CONNECTIONS = 8
COLUMNS = ("minute", "200", "4xx", "503/504", "bad", "memory", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=int, default=20)
    parser.add_argument("--warm", type=int, default=5, help="minutes that do not count")
    parser.add_argument("--seconds", type=float, default=60, help="of a row's load")
    parser.add_argument("--tolerance", type=float, default=0.05, help="the growth that is accepted")
    arguments = parser.parse_args()
    requests = mixed_requests()
    failed = False
    warm_bytes = growth = 0.0
    with LoadProcess() as generator, mixed_server() as server:
        print(row(COLUMNS), flush=True)
        for minute in range(1, arguments.warm + arguments.minutes + 1):
            load = generator.closed(server.port, requests, CONNECTIONS, arguments.seconds)
            used = server.usage().resident_bytes
            if minute <= arguments.warm:
                warm_bytes = used
            growth = used / warm_bytes - 1
            counts = grouped(load.statuses)
            failed |= counts["bad"] > 0
            cells = (minute, *(counts[name] for name in COLUMNS[1:5]))
            print(row((*cells, f"{used / 2**20:.0f} MiB", f"{growth:+.1%}")), flush=True)
    if growth > arguments.tolerance:
        print(f"memory grew by {growth:.1%}", file=sys.stderr)
    sys.exit(failed or growth > arguments.tolerance)


def mixed_server() -> Server:
    """`vitrail serve` with all models of the demo catalog."""
    port = free_port()
    command = [
        sys.executable, "-m", "service.cli", "serve", "--port", str(port),
        "--grpc-port", str(free_port()), "--log-level", "error",
    ]  # fmt: skip
    return Server(command, port)


def mixed_requests() -> list[bytes]:
    """The requests that the connections send in turn."""
    small = jpegs()
    large = [encode(photo) for photo in photos(SIZES["large"])[:2]]
    one = [image_or_form([jpeg]) for jpeg in small]
    broken = [Body(jpeg[: len(jpeg) // 2], "image/jpeg") for jpeg in small[:2]]
    return [
        *build_requests("/classify", one),
        *build_requests("/classify", [form([*small, *small])]),
        *build_requests("/classify", [image_or_form([jpeg]) for jpeg in large]),
        *build_requests("/classify", broken),
        *build_requests("/classify?model=unknown", one[:1]),
        *build_requests("/classify", one[:2], "X-Timeout-Ms: 1\r\n"),
        *build_requests("/embed", one),
        *build_requests("/embed?model=dinov2-focus-embed", one),
        *build_requests("/segment", one[:2]),
        *build_requests("/zero-shot?labels=a+cat&labels=a+cup+of+coffee", one),
        *build_requests("/attention?model=dinov2-attention", one[:1]),
    ]


def grouped(statuses: Counter[int]) -> Counter[str]:
    """The numbers of requests by the groups of `COLUMNS`."""
    groups: Counter[str] = Counter()
    for status, count in statuses.items():
        if status == 200:
            group = "200"
        elif 400 <= status < 500:
            group = "4xx"
        else:
            group = "503/504" if status in (503, 504) else "bad"
        groups[group] += count
    return groups


def row(cells: tuple[object, ...]) -> str:
    """One line of the table."""
    return "  ".join(f"{cell!s:>9}" for cell in cells)


if __name__ == "__main__":
    main()
