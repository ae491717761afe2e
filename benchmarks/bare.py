"""The bare loop: decodes, transforms and runs the same model without a server.

`python -m benchmarks.bare --catalog FILE --model NAME --photos FOLDER --engine eager` tries
every arrangement of `benchmarks/arrangement.py` and prints the images per second of each as JSON.
The fastest one is what a server on the same cores can be compared with.
"""

import argparse
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.arrangement import Arrangement, arrangements
from service.allocator import keep_freed_memory

WARM_S = 1.0


@dataclass(frozen=True, slots=True)
class Task:
    """What is run, as the command line names it."""

    catalog: Path
    model: str
    photos: Path
    engine: str
    transform: str
    precision: str


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--catalog", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--transform", default="exact")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--seconds", type=float, default=4, help="for each arrangement")
    arguments = vars(parser.parse_args())
    seconds = arguments.pop("seconds")
    task = Task(**arguments)
    rates = {
        name: _measure(task, arrangement, seconds)
        for name, arrangement in arrangements(len(os.sched_getaffinity(0))).items()
    }
    json.dump(rates, sys.stdout)


def _measure(task: Task, arrangement: Arrangement, seconds: float) -> float:
    """The images per second of all processes together."""
    context = multiprocessing.get_context("spawn")
    pipes, children = [], []
    for _ in range(arrangement.processes):
        ours, theirs = context.Pipe()
        child = context.Process(target=_child, args=(task, arrangement, theirs), daemon=True)
        child.start()
        theirs.close()  # so that the end of the child ends a wait for it
        pipes.append(ours)
        children.append(child)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send(seconds)
    rate: float = sum(pipe.recv() for pipe in pipes)
    for child in children:
        child.join()
    return rate


def _child(task: Task, arrangement: Arrangement, pipe: Connection) -> None:
    """Load the model, warm up, say so, and measure for as long as the parent says."""
    keep_freed_memory()
    from benchmarks.bare_loop import BareLoop
    from models import Registry
    from service.worker.runner import use_threads

    use_threads(1)  # so that a loop's pool of OpenMP threads is the only one, which is fastest
    threads = arrangement.loops * arrangement.threads
    registry = Registry.from_catalog(
        task.catalog, engine=task.engine, transform=task.transform, precision=task.precision,
        threads=threads, streams=arrangement.loops,
    )  # fmt: skip
    photos = [path.read_bytes() for path in sorted(task.photos.glob("*.jpg"))]
    bare = BareLoop(registry.get(task.model), photos, arrangement)
    bare.rate(WARM_S)
    pipe.send(None)
    pipe.send(bare.rate(pipe.recv()))


if __name__ == "__main__":
    main()
