"""The lanes around the policy, with a fake device whose gates the test opens."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from models.trunks.engines.buckets import buckets
from service.worker.batch_queue import BatchQueue, Entry
from service.worker.batcher import Batcher
from service.worker.places import QueueFull
from service.worker.prober import Prober
from service.worker.runner import Item, ItemResult
from service.worker.scheduler import Batch, Scheduler
from tests.conftest import wait_until


class FakeDevice:
    """Runs a batch when its gate is opened; remembers what ran and what was dropped."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.started: list[list[str]] = []
        self.finished: list[str] = []
        self.dropped: list[str] = []
        self.poison: set[str] = set()

    def execute(self, batch: Batch) -> None:
        names = [entry.payload for entry in batch.entries]
        self.started.append(names)
        self.gate.acquire()
        if self.poison & set(names):
            raise RuntimeError("the fake device fails on poison")
        self.finished += names

    def drop(self, entry: Entry) -> None:
        self.dropped.append(entry.payload)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def batcher(device: FakeDevice) -> Iterator[Batcher]:
    made = Batcher(Scheduler(lanes=1), execute=device.execute, drop=device.drop)
    made.add_queue(BatchQueue("q", max_batch_size=4, capacity=8))
    made.start()
    yield made
    device.gate.release(1000)
    made.close()


def put(batcher: Batcher, *names: str) -> list[Entry]:
    batcher.admit("q", len(names))
    entries = [Entry(name, flow=name) for name in names]
    for entry in entries:
        batcher.put("q", [entry])
    return entries


def test_a_batch_gathers_while_the_device_is_busy(batcher: Batcher, device: FakeDevice) -> None:
    put(batcher, "a")
    wait_until(lambda: device.started == [["a"]])
    put(batcher, "b", "c", "d", "e", "f")
    device.gate.release(3)
    wait_until(lambda: len(device.finished) == 6)
    assert device.started == [["a"], ["b", "c", "d", "e"], ["f"]]


def test_a_cancelled_caller_costs_its_peers_nothing(batcher: Batcher, device: FakeDevice) -> None:
    put(batcher, "a")
    wait_until(lambda: device.started == [["a"]])
    entries = put(batcher, "b", "c")
    entries[0].cancelled = True
    device.gate.release(2)
    wait_until(lambda: device.finished == ["a", "c"])
    assert device.dropped == ["b"]


def test_a_failing_batch_does_not_kill_its_lane(batcher: Batcher, device: FakeDevice) -> None:
    device.poison = {"bad"}
    put(batcher, "bad")
    device.gate.release()
    wait_until(lambda: device.started == [["bad"]] and batcher.in_flight() == 0)
    put(batcher, "good")
    device.gate.release()
    wait_until(lambda: device.finished == ["good"])
    assert batcher.alive()


def test_a_full_queue_refuses(batcher: Batcher, device: FakeDevice) -> None:
    put(batcher, "a")
    wait_until(lambda: device.started == [["a"]])
    put(batcher, *"bcdefghi")
    with pytest.raises(QueueFull):
        batcher.admit("q", 1)
    assert batcher.depth() == {"q": 8}


def test_dead_entries_make_room_even_while_the_device_is_stuck(
    batcher: Batcher, device: FakeDevice
) -> None:
    put(batcher, "a")
    wait_until(lambda: device.started == [["a"]])
    for entry in put(batcher, *"bcdefghi"):
        entry.cancelled = True
    put(batcher, "j")
    assert sorted(device.dropped) == list("bcdefghi")


def test_closing_runs_what_was_accepted(device: FakeDevice) -> None:
    made = Batcher(Scheduler(lanes=2), execute=device.execute, drop=device.drop)
    made.add_queue(BatchQueue("q", max_batch_size=2, capacity=99))
    made.start()
    put(made, *"abcdefgh")
    device.gate.release(100)
    made.close()
    assert sorted(device.finished) == list("abcdefgh")


def test_what_comes_after_closing_is_dropped_and_not_waited_for(device: FakeDevice) -> None:
    made = Batcher(Scheduler(lanes=1), execute=device.execute, drop=device.drop)
    made.add_queue(BatchQueue("q", max_batch_size=2, capacity=99))
    made.start()
    made.close()
    put(made, "late")
    assert device.dropped == ["late"]
    made.remove_queue("q")


def test_a_queue_is_removed_only_when_it_is_empty(batcher: Batcher, device: FakeDevice) -> None:
    put(batcher, "a", "b")
    remover = threading.Thread(target=batcher.remove_queue, args=("q",))
    remover.start()
    device.gate.release(2)
    remover.join(10)
    assert sorted(device.finished) == ["a", "b"]
    with pytest.raises(KeyError):
        batcher.admit("q", 1)


def test_a_queue_that_closing_leaves_with_images_to_decode_is_not_waited_for(
    batcher: Batcher,
) -> None:
    batcher.admit("q", 1)
    remover = threading.Thread(target=batcher.remove_queue, args=("q",), daemon=True)
    remover.start()
    batcher.close()
    remover.join(10)
    assert not remover.is_alive()


def test_a_stuck_device_is_noticed(device: FakeDevice) -> None:
    now = [100.0]
    made = Batcher(
        Scheduler(lanes=1),
        execute=device.execute, drop=device.drop, clock=lambda: now[0],
    )  # fmt: skip
    made.add_queue(BatchQueue("q", max_batch_size=4, capacity=8))
    made.start()
    assert made.stuck_for() == 0
    put(made, "a")
    wait_until(lambda: device.started == [["a"]])
    now[0] = 130.0
    assert made.stuck_for() == 30
    device.gate.release()
    made.close()
    assert made.stuck_for() == 0


def test_a_gpus_warm_up_has_each_size_as_one_batch() -> None:
    sizes: list[int] = []

    def execute(batch: Batch) -> None:
        sizes.append(len(batch.entries))
        for entry in batch.entries:
            entry.payload.done(ItemResult([], 0.0, 0.0, len(batch.entries)))

    batcher = Batcher(Scheduler(lanes=2), execute=execute, drop=lambda entry: None)
    batcher.add_queue(BatchQueue("q", max_batch_size=10, capacity=10))
    runner = SimpleNamespace(
        trunk=SimpleNamespace(engine=SimpleNamespace(warm_up_sizes=buckets)),
        blank_item=lambda: Item.awaited("q", torch.zeros(1)),
    )
    prober = Prober(batcher, {"q": runner}, interval_s=1, limit_s=1)  # type: ignore[dict-item]
    batcher.start()
    try:
        prober.warm_up("q", 10)
    finally:
        batcher.close()
    assert sorted(sizes) == [1, 2, 2, 3, 4, 6, 8, 10]  # 12 rows fill the largest batch, and more
