"""The cost of the hop from gateway to worker: `python -m benchmarks.hop [--model NAME]`.

A single process and a gateway with one worker take turns for several rounds on the same photos.
Both may use all cores. Prints medians over the rounds, and ratios. The load generator runs in this
process, on the same cores as the servers.
"""

import argparse
import statistics

import uvloop

from benchmarks.bodies import image_or_form
from benchmarks.load import Load, build_requests, closed_loop
from benchmarks.photos import jpegs
from benchmarks.servers import demo_server, free_port

CONNECTIONS = (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="efficientnet-lite0")
    parser.add_argument("--route", default="classify")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    arguments = parser.parse_args()
    bodies = [image_or_form([photo]) for photo in jpegs()]
    requests = build_requests(f"/{arguments.route}?model={arguments.model}", bodies)
    ports = {"one process": free_port(), "gateway + worker": free_port()}
    loads: dict[tuple[str, int], list[Load]] = {}
    single = demo_server(ports["one process"], arguments.model)
    apart = demo_server(ports["gateway + worker"], arguments.model, "--workers", "1")
    with single, apart:
        for _ in range(arguments.rounds):
            for count in CONNECTIONS:
                for name, port in ports.items():
                    load = uvloop.run(closed_loop(port, requests, count, arguments.seconds))
                    loads.setdefault((name, count), []).append(load)
    print(f"{arguments.model}, {arguments.rounds} rounds of {arguments.seconds:g} s: medians")
    for count in CONNECTIONS:
        rates, latencies = {}, {}
        for name in ports:
            runs = loads[name, count]
            rates[name] = statistics.median(load.rate for load in runs)
            latencies[name] = statistics.median(load.percentile(0.5) for load in runs)
            failed = sum(load.failures for load in runs)
            print(f"  {count:2} connections, {name:16} {rates[name]:6.1f} images/s, "
                  f"p50 {latencies[name]:6.1f} ms, {failed} failed")  # fmt: skip
        one, two = ports
        print(f"  {count:2} connections: the hop keeps {rates[two] / rates[one]:.2f} of the rate "
              f"and adds {latencies[two] - latencies[one]:+.1f} ms to p50")  # fmt: skip


if __name__ == "__main__":
    main()
