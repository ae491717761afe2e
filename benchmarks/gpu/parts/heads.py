"""Many VQT heads on one trunk."""

import random
import statistics
import time

from benchmarks.gpu.networks import load_trunk
from benchmarks.gpu.options import Options, Rows
from benchmarks.gpu.server import SETTLE_S, check_end
from benchmarks.heads import Bench, Requests, random_head
from models.errors import ModelsError
from models.trunks.base import Trunk


def heads(options: Options) -> Rows:
    """VQT heads on one trunk: each image is for one of them, drawn at random."""
    for network in options.networks:
        for engine in options.engines:
            try:
                trunk = load_trunk(options, network, engine, options.precision)
            except ModelsError as error:
                yield {"network": network, "engine": engine, "refused": str(error)}
                continue
            if trunk.blocks:
                yield from _heads(options, network, engine, trunk)


def _heads(options: Options, network: str, engine: str, trunk: Trunk) -> Rows:
    counts = (1, 4) if options.quick else (1, 64, 1000)
    calls = [random_head(trunk, seed) for seed in range(max(counts))]
    bench = Bench(trunk, 0, max(options.batches))
    images = 4 * max(options.batches)
    one = 0.0
    for count in counts:
        asked: Requests = [
            ("shared", [random.Random(n).choice(calls[:count])]) for n in range(images)
        ]
        end = time.monotonic() + SETTLE_S
        bench.run(asked)
        while not trunk.engine.settled:
            check_end(trunk, end)
            time.sleep(0.1)
            bench.run(asked)  # some engines choose by passes
        rates = [bench.run(asked) for _ in range(2 if options.quick else 6)][1:]
        rate = statistics.median(rates)
        one = one or rate
        yield {"network": network, "engine": engine, "heads": count, "images_per_s": rate,
               "time_of_one": one / rate, "holds": count != 64 or one / rate <= 1.1}  # fmt: skip
