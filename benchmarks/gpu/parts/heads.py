"""Many VQT heads on one trunk."""

import random
import statistics
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.gpu.networks import load_trunk
from benchmarks.gpu.options import Options, Rows
from benchmarks.gpu.server import SETTLE_S, check_end
from benchmarks.heads import Bench, Requests, random_head
from models.errors import ModelsError
from models.inference import HeadCall, run_pass
from models.trunks.base import Trunk

# How much a score may differ that a head finds together with others.
TOLERANCE = 1e-5


def heads(options: Options) -> Rows:
    """VQT heads on one trunk: what they find together is compared with what each finds. Then each
    image is for one of them, drawn at random."""
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
    error = _largest_error(trunk, calls[: counts[1]])
    yield {"network": network, "engine": engine, "heads": counts[1], "error": error,
           "holds": error <= TOLERANCE}  # fmt: skip
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


def _largest_error(trunk: Trunk, calls: Sequence[HeadCall]) -> float:
    """The largest difference between the scores that heads of a batch find together and apart."""
    batch = trunk.collate(trunk.samples(len(calls)))
    together = run_pass(trunk, batch, [[call] for call in calls])
    apart = run_pass(trunk, batch, [[HeadCall(call.head)] for call in calls])
    errors = []
    for [found], [own] in zip(together, apart, strict=True):
        if isinstance(found, Exception):
            raise found
        if isinstance(own, Exception):
            raise own
        powers = np.exp(own["logits"] - own["logits"].max())
        expected = (powers / powers.sum())[found["index"].astype(int)]
        errors.append(float(np.abs(found["score"] - expected).max()))
    return max(errors)
