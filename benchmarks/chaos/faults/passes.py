"""Faults of passes: those of `inside/sitecustomize.py`."""

import io
import threading
import time

from PIL import Image

from benchmarks.chaos.faults.fault import FAULT_S
from benchmarks.chaos.target import Target

POISONOUS = 8


def poisoned(fault: str, expected: int, target: Target) -> None:
    """Images for which a pass fails get an error of their own, and those beside them none."""
    poison = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(poison, "PNG")
    statuses: list[int] = []

    def ask() -> None:
        path = f"/classify?model={target.model}"
        statuses.append(target.ask("POST", path, content=poison.getvalue()))

    with target.fault(fault):
        threads = [threading.Thread(target=ask) for _ in range(POISONOUS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [expected] * POISONOUS, statuses
    target.wait_whole()


def worker_killed_by_request(target: Target) -> None:
    """It is sent to a second worker, and then refused."""
    poison = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(poison, "PNG")
    with target.fault("kill"):
        path = f"/classify?model={target.model}"
        status = target.ask("POST", path, content=poison.getvalue())
    assert status == 503, status
    target.wait_whole()


def out_of_memory(target: Target) -> None:
    with target.fault("memory"):
        time.sleep(FAULT_S)
