"""One batch on all cores compared with one batch per core: `python -m benchmarks.streams [MODEL]`.

One thread with all cores, and one thread per core, take turns at passes of the same trunk in one
process. Also measures how a second pool of OpenMP threads slows down the first (see `use_threads`
in service/worker/runner.py). Prints medians in images per second.
"""

import os
import queue
import statistics
import sys
import threading
import time

from service.allocator import keep_freed_memory

ROUNDS = 4
SECONDS = 2.0


def main() -> None:
    keep_freed_memory()
    import torch

    from models import Registry

    torch.set_num_threads(1)
    name = sys.argv[1] if len(sys.argv) > 1 else "efficientnet-lite0"
    trunk = Registry.from_catalog("demo").get(name).trunk
    cores = len(os.sched_getaffinity(0))

    class Lane(threading.Thread):
        """Runs passes with (threads, batch) from `settings`; puts images per second into `rate`."""

        def __init__(self) -> None:
            super().__init__(daemon=True)
            self.settings: queue.Queue[tuple[int, int]] = queue.Queue()
            self.rate: queue.Queue[float] = queue.Queue()
            self.start()

        def run(self) -> None:
            while True:
                threads, batch = self.settings.get()
                torch.get_num_threads()
                torch.set_num_threads(threads)
                pixels = torch.zeros(batch, 3, *trunk.preprocess.input_size, dtype=torch.uint8)
                done, end = 0, time.monotonic() + SECONDS
                with torch.inference_mode():
                    while time.monotonic() < end:
                        trunk.forward(pixels)
                        done += batch
                self.rate.put(done / SECONDS)

    lanes = [Lane() for _ in range(cores)]
    rates: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for batch in (1, 2, 4, 8, 16):
            lanes[0].settings.put((cores, batch))
            rates.setdefault(f"all cores, batch {batch}", []).append(lanes[0].rate.get())
        for batch in (1, 2, 4, 8):
            for lane in lanes:
                lane.settings.put((1, batch))
            total = sum(lane.rate.get() for lane in lanes)
            rates.setdefault(f"one core each, batch {batch}", []).append(total)
    lanes[1].settings.put((cores, 1))
    lanes[1].rate.get()
    for _ in range(ROUNDS):
        lanes[0].settings.put((cores, 1))
        rates.setdefault("all cores, batch 1, with a second pool", []).append(lanes[0].rate.get())
    print(f"{name}, {cores} cores, {ROUNDS} rounds of {SECONDS:g} s: medians in images/s")
    for label, values in rates.items():
        print(f"  {label:42} {statistics.median(values):6.1f}")


if __name__ == "__main__":
    main()
