"""The order of decoding, with a pool whose threads the test holds."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.worker.decode_queue import DecodeQueue, Source
from tests.conftest import wait_until

THREADS = 2


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(THREADS + 1) as made:
        yield made


class Held:
    """A request whose inputs are decoded when its gate is opened."""

    def __init__(self, queue: DecodeQueue, client: str, inputs: int, *, bulk: bool = False) -> None:
        self.gate = threading.Semaphore(0)
        self.begun = 0
        self.ended = 0
        self.source = Source(client, bulk, "image", self._decode, inputs)
        queue.add(self.source)

    def _decode(self) -> None:
        self.begun += 1
        assert self.gate.acquire(timeout=30)
        self.ended += 1


def test_one_clients_images_leave_a_thread_for_the_others(pool: ThreadPoolExecutor) -> None:
    queue = DecodeQueue(pool, THREADS)
    hostile = [Held(queue, "hostile", 3) for _ in range(4)]
    wait_until(lambda: sum(each.begun for each in hostile) == THREADS)
    good = Held(queue, "good", 3)
    good.gate.release(3)
    wait_until(lambda: good.ended == 3)
    assert sum(each.begun for each in hostile) == THREADS
    for each in hostile:
        each.gate.release(3)
    wait_until(lambda: all(each.ended == 3 for each in hostile))
    assert queue.depth() == 0


def test_the_inputs_of_a_request_that_ends_are_not_begun(pool: ThreadPoolExecutor) -> None:
    queue = DecodeQueue(pool, THREADS)
    first, second = Held(queue, "one", 2), Held(queue, "one", 5)
    wait_until(lambda: first.begun + second.begun == THREADS)
    begun = second.begun
    queue.withdraw(second.source)
    assert queue.depth() == 2 - first.begun
    first.gate.release(9)
    second.gate.release(9)
    wait_until(lambda: first.ended == 2)
    assert second.begun == begun


def test_the_forecast_counts_what_waits_and_what_runs(pool: ThreadPoolExecutor) -> None:
    now = [0.0]
    queue = DecodeQueue(pool, THREADS, clock=lambda: now[0])
    assert queue.forecast("image", 4, "any", bulk=False) == 0
    queue.measured("image", 1.0)
    assert queue.forecast("image", 1, "any", bulk=False) == 1.0
    held = Held(queue, "other", 6)
    wait_until(lambda: held.begun == THREADS)
    # two that run, four that wait, of which another client's one image lets one go first
    assert queue.forecast("image", 4, "other", bulk=False) == (2 + 4 + 4) / THREADS
    assert queue.forecast("image", 1, "new", bulk=False) == (2 + 1 + 1) / THREADS
    now[0] = 0.5
    assert queue.forecast("image", 1, "new", bulk=False) == (1 + 1 + 1) / THREADS
    held.gate.release(6)
    wait_until(lambda: held.ended == 6)
