"""The bare loop: decodes, preprocesses and runs the same model without a server."""

import itertools
import threading
import time
from collections.abc import Sequence

from models import Model
from models.inference import HeadCall, run_rows
from models.inputs.images import decode_image
from service.worker.runner import use_threads


def bare_rate(model: Model, photos: Sequence[bytes], *, workers: int, threads: int, batch: int,
              seconds: float) -> float:  # fmt: skip
    """Images per second of `workers` loops, each with `threads` threads and batches of `batch`."""
    done = [0] * workers
    end = time.monotonic() + seconds

    def loop(worker: int) -> None:
        use_threads(threads)
        trunk, head = model.trunk, model.head(None, {})
        call = HeadCall(head)
        source = itertools.cycle(photos)
        while time.monotonic() < end:
            images = [decode_image(next(source)) for _ in range(batch)]
            pixels = trunk.collate([trunk.prepare(image) for image in images])
            rows = run_rows(trunk, pixels, call)
            for row, image in zip(rows, images, strict=True):
                head.finish(row, image.size)
            if time.monotonic() < end:
                done[worker] += batch

    running = [threading.Thread(target=loop, args=(worker,)) for worker in range(workers)]
    started = time.monotonic()
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(done) / min(seconds, time.monotonic() - started)
