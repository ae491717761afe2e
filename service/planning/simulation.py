"""A device in virtual time: the server's own scheduler, with passes that take a stated time.

Nothing waits, so that a thousand devices are simulated in seconds.
"""

import heapq
import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from service.planning.load import TrunkLoad
from service.worker.batch_queue import BatchQueue, Entry
from service.worker.scheduler import Batch, Scheduler

CAPACITY = 1 << 20


@dataclass(slots=True)
class Simulated:
    """What was seen of one trunk on one device.

    Args:
        latencies: seconds from arrival to result.
        heads: those that images were for.
    """

    latencies: list[float] = field(default_factory=list)
    images: int = 0
    passes: int = 0
    heads: set[int] = field(default_factory=set)

    def quantile(self, share: float) -> float:
        """The latency that this share of the images did not exceed."""
        return float(np.quantile(self.latencies, share))


def simulate(
    loads: Sequence[TrunkLoad], *, images: int, lanes: int = 1, seed: int = 0
) -> list[Simulated]:
    """Have images arrive at random times for the trunks of one device, until all have run.

    Args:
        images: how many, over all trunks. The first tenth are not counted.
        lanes: of a CPU, whose cores they share; 1 for a GPU.
    """
    chance, heads_chance = random.Random(seed), random.Random(seed)
    scheduler = Scheduler(lanes=lanes, cpu=lanes > 1)
    queues = [BatchQueue(str(n), load.max_batch_size, CAPACITY) for n, load in enumerate(loads)]
    for queue in queues:
        scheduler.add(queue)
    seconds = [load.seconds() for load in loads]
    results = [Simulated() for _ in loads]
    rates = list(accumulate(load.rate for load in loads))
    total = rates[-1]
    ends: list[tuple[float, int, Batch]] = []
    arrival, number = chance.expovariate(total), 0
    counted_from = images / 10 / total  # seconds
    while number < images or ends:
        if number < images and (not ends or arrival <= ends[0][0]):
            now, place = arrival, bisect(rates, chance.random() * total)
            head = heads_chance.randrange(loads[place].heads)
            entry = Entry((place, head), flow=number, client="")
            queues[place].places.take(entry.client, 1, bulk=False)
            queues[place].put(entry, now)
            arrival, number = now + chance.expovariate(total), number + 1
        else:
            now, _, batch = heapq.heappop(ends)
            scheduler.finish(batch, now)
            place, _ = batch.entries[0].payload
            results[place].images += len(batch.entries)
            results[place].passes += 1
            results[place].latencies += [
                now - entry.enqueued for entry in batch.entries if entry.enqueued >= counted_from
            ]
        for lane in range(lanes):
            batch_or_none, _ = scheduler.next_batch(now, lane)
            if batch_or_none is None:
                continue
            batch = batch_or_none
            place, heads = batch.entries[0].payload[0], {e.payload[1] for e in batch.entries}
            results[place].heads |= heads
            load, count = loads[place], len(batch.entries)
            shared = min(count, load.heads) - len(heads)  # images for heads that the pass has
            pass_s = seconds[place][count] - shared * load.head_s
            heapq.heappush(ends, (now + pass_s / (lanes if batch.wide else 1), id(batch), batch))
    return results
