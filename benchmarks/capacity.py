"""How far `vitrail plan` is off: `python -m benchmarks.capacity [--fleet] [--worker]`.

Prints the model's latencies beside those of the scheduler in virtual time. `--fleet` plans a
thousand trunks with a hundred heads each, whose rates follow Zipf's law, and simulates all devices
and each image's head.
`--worker` sends photos at random times to a worker in this process, and compares the time that they
spend in the queue and in passes with what is predicted from the passes that it measured; the
machine should be idle.
"""

import argparse
import asyncio
import random
import time

import numpy as np
from prometheus_client import CollectorRegistry

from benchmarks.photos import jpegs
from models import Registry
from service.metrics import Metrics
from service.planning.load import TrunkLoad
from service.planning.placement import place
from service.planning.queueing import Prediction, predict
from service.planning.simulation import Simulated, simulate
from service.types import Call, InferRequest
from service.worker.backend import LocalBackend
from service.worker_options import WorkerOptions

# A ViT-S/16 on two cores, by the images in a pass.
PASSES = {1: 0.010, 4: 0.025, 16: 0.085, 32: 0.165}
IMAGES = 50_000
SHARES = (0.2, 0.5, 0.7, 0.85)
TRUNKS = 1000
FLEET_RATE = 60_000.0
# A pass of 16 images for as many heads takes a hundredth longer than one for one head
# (docs/benchmarks.md).
HEADS, HEAD_COST = 100, 0.01 * PASSES[16] / 15
# Images for each device.
FLEET_IMAGES = 1000
TARGET_S = 0.200
MODEL = "efficientnet-lite0"
SECONDS = 12.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fleet", action="store_true")
    parser.add_argument("--worker", action="store_true")
    arguments = parser.parse_args()
    if arguments.fleet:
        fleet()
    elif arguments.worker:
        asyncio.run(worker())
    else:
        errors()


def errors() -> None:
    head()
    for lanes in (1, 2):
        for share in SHARES:
            alone = load("a", share * lanes)
            [seen] = simulate([alone], images=IMAGES, lanes=lanes)
            row(f"{lanes} lanes", share, predict(alone, lanes), seen)


def load(name: str, share: float) -> TrunkLoad:
    return TrunkLoad(name, share / TrunkLoad(name, 1.0, PASSES).utilization, PASSES)


def head() -> None:
    print("| | busy | p50 ms, model | scheduler | p99 ms, model | scheduler |")
    print("|---|--:|--:|--:|--:|--:|")


def row(name: str, share: float, predicted: Prediction, seen: Simulated) -> None:
    cells = predicted.p50, seen.quantile(0.5), predicted.p99, seen.quantile(0.99)
    figures = " | ".join(f"{seconds * 1e3:.1f}" for seconds in cells)
    print(f"| {name} | {share:.0%} | {figures} |", flush=True)


def fleet() -> None:
    loads = fleet_loads()
    started = time.perf_counter()
    devices = place(loads, TARGET_S)
    planned = time.perf_counter() - started
    count = sum(device.count for device in devices)
    shared = [device for device in devices if len(device.loads) > 1]
    print(
        f"{TRUNKS} trunks, {TRUNKS * HEADS} heads, {FLEET_RATE:.0f} images/s, p99 of "
        f"{TARGET_S * 1e3:.0f} ms: {count} devices, of which {len(shared)} are shared by "
        f"{sum(len(device.loads) for device in shared)} trunks; planned in {planned:.0f} s",
        flush=True,
    )
    started = time.perf_counter()
    simulated = [
        simulate(device.loads, images=FLEET_IMAGES, seed=number)
        for device in devices
        for number in range(device.count)
    ]
    seconds = time.perf_counter() - started
    latencies = np.concatenate([each.latencies for seen in simulated for each in seen])
    passes = sum(each.passes for seen in simulated for each in seen)
    heads = {
        (load.name, head)
        for load, each in zip(
            (load for device in devices for _ in range(device.count) for load in device.loads),
            (each for seen in simulated for each in seen),
            strict=True,
        )
        for head in each.heads
    }
    print(
        f"{FLEET_IMAGES * count} images for {len(heads)} heads in {passes} passes simulated in "
        f"{seconds:.0f} s: p50 "
        f"{np.quantile(latencies, 0.5) * 1e3:.0f} ms, p99 {np.quantile(latencies, 0.99) * 1e3:.0f} "
        f"ms, {np.mean(latencies > TARGET_S):.2%} of the images later than the target"
    )


def fleet_loads() -> list[TrunkLoad]:
    """Trunks that are half to three times as slow as the one above."""
    chance = random.Random(0)
    weights = [1 / rank for rank in range(1, TRUNKS + 1)]
    loads = []
    for n, weight in enumerate(weights):
        slower = chance.uniform(0.5, 3)
        passes = {images: seconds * slower for images, seconds in PASSES.items()}
        rate = FLEET_RATE * weight / sum(weights)
        loads.append(TrunkLoad(str(n), rate, passes, heads=HEADS, head_s=HEAD_COST * slower))
    return loads


async def worker() -> None:
    registry = Registry.from_catalog("demo", device="cpu")
    backend = LocalBackend(registry, WorkerOptions(startup=(MODEL,)), Metrics(CollectorRegistry()))
    lanes, trunk = backend.options.streams, registry.catalog.model(MODEL).trunk
    photos = jpegs()
    await backend.start()
    await backend.load(MODEL)

    async def ask(photo: bytes) -> float:
        deadline = time.monotonic() + 60
        request = InferRequest(inputs=[photo], calls=[Call(MODEL, "classify")], deadline=deadline)
        [image] = (await backend.infer(request)).images
        assert image.timing is not None, image.error
        return (image.timing.queue_ms + image.timing.compute_ms) / 1e3

    async def rush(rate: float, seconds: float) -> list[float]:
        """Poisson arrivals, whether or not earlier ones are answered."""
        chance, tasks, due = random.Random(1), [], time.monotonic()
        end = due + seconds
        while due < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.append(asyncio.create_task(ask(chance.choice(photos))))
            due += chance.expovariate(rate)
        return await asyncio.gather(*tasks)

    await asyncio.gather(*(ask(photo) for _ in range(8) for photo in photos))
    started, count = time.monotonic(), 0
    while time.monotonic() < started + SECONDS / 2:
        count += len(await asyncio.gather(*(ask(photo) for photo in photos)))
    capacity = count / (time.monotonic() - started)
    print(f"capacity: {capacity:.0f} photos/s, {lanes} lanes", flush=True)
    head()
    for share in (0.3, 0.5, 0.7):
        seen = await rush(share * capacity, SECONDS)
        costs = backend.state()["queues"][trunk]["pass_seconds"]
        predicted = predict(TrunkLoad(trunk, share * capacity, costs, 16), lanes)
        row("worker", share, predicted, Simulated(seen))
        print(f"passes: { {s: round(1e3 * t, 1) for s, t in costs.items()} } ms", flush=True)
    await backend.close()


if __name__ == "__main__":
    main()
