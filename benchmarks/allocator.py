"""The effect of keeping freed memory (service/allocator.py): `python -m benchmarks.allocator`.

A process with glibc's defaults and one with Vitrail's settings take turns at the same forward
passes. Prints medians, page faults per image, and the ratio.
"""

import os
import resource
import statistics
import subprocess
import sys
import threading
import time

ROUNDS = 5
SECONDS = 3.0
BATCH = 16


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    rates: dict[str, list[float]] = {"default": [], "kept": []}
    faults: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, values in rates.items():
            command = [sys.executable, "-m", "benchmarks.allocator", name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rate, faults[name] = map(float, output.split())
            values.append(rate)
    print(f"efficientnet-lite0, batch {BATCH}, {cores} threads, {ROUNDS} rounds: medians")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        print(f"  {name:8} {rate:6.1f} images/s, {faults[name]:7.0f} page faults per image")
    print(f"  ratio    {medians['kept'] / medians['default']:.2f}")


def measure(kept: bool) -> None:
    """Print the images per second and page faults per image of passes in a separate thread."""
    if kept:
        from service.allocator import keep_freed_memory

        keep_freed_memory()
    import torch

    from models import Registry

    model = Registry.from_catalog("demo").get("efficientnet-lite0")
    pixels = torch.zeros(BATCH, 3, 224, 224, dtype=torch.uint8)

    def run(seconds: float) -> int:
        done, end = 0, time.monotonic() + seconds
        with torch.inference_mode():
            while time.monotonic() < end:
                model.trunk.forward(pixels)
                done += BATCH
        return done

    def passes() -> None:
        run(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        done = run(SECONDS)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        print(done / SECONDS, (after - before) / done)

    thread = threading.Thread(target=passes)
    thread.start()
    thread.join()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(kept=sys.argv[1] == "kept")
    else:
        main()
