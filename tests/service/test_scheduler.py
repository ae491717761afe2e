"""The policy in virtual time: no threads, no torch, no sleeping."""

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

from service.worker.batch_queue import GATHER_IMAGES, GATHER_S, BatchQueue, Entry
from service.worker.places import QueueFull
from service.worker.scheduler import Batch, Scheduler
from service.worker.turns import work_ahead


def queue(name: str = "q", **settings: object) -> BatchQueue:
    options: dict[str, object] = {"max_batch_size": 8, "capacity": 64}
    return BatchQueue(name, **{**options, **settings})  # type: ignore[arg-type]


def scheduler(*queues: BatchQueue, lanes: int = 1, cpu: bool = False) -> Scheduler:
    made = Scheduler(lanes=lanes, cpu=cpu)
    for each in queues:
        made.add(each)
    return made


def put(target: BatchQueue, *names: str, now: float = 0, **settings: object) -> list[Entry]:
    flow = settings.pop("flow", None)
    entries = [Entry(name, flow or name, **settings) for name in names]  # type: ignore[arg-type]
    for entry in entries:
        target.places.take(entry.client, 1, bulk=entry.bulk)
        target.put(entry, now)
    return entries


def names(batch: Batch | None) -> list[str]:
    return [entry.payload for entry in batch.entries] if batch else []


def take(policy: Scheduler, now: float = 0) -> list[str]:
    return names(policy.next_batch(now)[0])


def test_an_idle_device_takes_what_is_there_at_once() -> None:
    q = queue()
    policy = scheduler(q)
    put(q, "a", now=5)
    assert take(policy, now=5) == ["a"]


def test_a_busy_device_lets_the_queue_grow_up_to_the_cap() -> None:
    q = queue(max_batch_size=3)
    policy = scheduler(q)
    put(q, "a")
    batch, _ = policy.next_batch(0)
    assert batch is not None
    put(q, "b", "c", "d", "e", now=1)
    assert take(policy, now=1) == []
    policy.finish(batch, 2)
    assert take(policy, now=2) == ["b", "c", "d"]


def test_two_batches_are_in_flight_at_most() -> None:
    q = queue(max_batch_size=1)
    policy = scheduler(q, lanes=2)
    put(q, "a", "b", "c")
    assert [take(policy), take(policy), take(policy)] == [["a"], ["b"], []]


def test_a_delay_is_waited_only_if_asked_for_and_never_by_a_full_batch() -> None:
    q = queue(max_batch_size=2, max_delay_s=0.010)
    policy = scheduler(q)
    put(q, "a", now=1.0)
    assert policy.next_due() == pytest.approx(1.010)
    assert take(policy, now=1.009) == []
    put(q, "b", now=1.009)
    assert take(policy, now=1.009) == ["a", "b"]
    put(q, "c", now=2.0)
    policy.finish(policy.running[0], 2.0)
    assert take(policy, now=2.011) == ["c"]


def test_the_expired_and_the_cancelled_never_run_and_give_their_places_back() -> None:
    q = queue(capacity=3)
    policy = scheduler(q)
    late = put(q, "late", deadline=1.0)[0]
    gone = put(q, "gone")[0]
    put(q, "here")
    gone.cancelled = True
    batch, dead = policy.next_batch(1.0)
    assert names(batch) == ["here"]
    assert dead == [late, gone]
    assert q.admitted == 0


def test_an_entry_cancelled_while_the_queue_is_swept_gives_its_place_back_once() -> None:
    class CancelledMeanwhile(Entry):
        """Another thread cancels it after it was first looked at."""

        def dead(self, now: float) -> bool:
            before = self.cancelled
            self.cancelled = True
            return before

    q = queue(capacity=4)
    put(q, "gone", flow="same")[0].cancelled = True
    q.places.take("", 1, bulk=False)
    q.put(CancelledMeanwhile("meanwhile", flow="same"), 0.0)
    dead = q.sweep(0.0)
    assert (len(q), q.admitted) == (2 - len(dead), 2 - len(dead))
    q.sweep(0.0)
    assert (len(q), q.admitted) == (0, 0)


def test_a_full_queue_refuses_at_once_and_takes_none_of_the_request() -> None:
    q = queue(capacity=3)
    q.places.take("", 2, bulk=False)
    with pytest.raises(QueueFull):
        q.places.take("", 2, bulk=False)
    q.places.take("", 1, bulk=False)
    q.places.give_back("", 3, bulk=False)
    assert q.admitted == 0


def test_requests_take_turns_so_that_a_large_one_cannot_block_singles() -> None:
    q = queue(max_batch_size=4)
    policy = scheduler(q)
    put(q, *[f"big{i}" for i in range(100)][:50], flow="big")
    put(q, "one", "two")
    assert take(policy) == ["big0", "one", "two", "big1"]


def test_order_within_a_request_is_kept() -> None:
    q = queue()
    policy = scheduler(q)
    put(q, "1", "2", "3", flow="same")
    assert take(policy) == ["1", "2", "3"]


def test_interactive_goes_before_bulk_and_bulk_is_not_starved() -> None:
    q = queue(max_batch_size=8, capacity=1000)
    policy = scheduler(q)
    put(q, *[f"bulk{i}" for i in range(20)], bulk=True)
    put(q, *[f"user{i}" for i in range(20)])
    taken = take(policy)
    assert [name[:4] for name in taken].count("bulk") == 2
    assert taken[0] == "user0"


def test_a_lone_bulk_request_runs_at_once() -> None:
    q = queue()
    policy = scheduler(q)
    put(q, "bulk", bulk=True)
    assert take(policy) == ["bulk"]


def test_queues_never_mix_and_the_longest_waiting_goes_first() -> None:
    a, b = queue("a"), queue("b")
    policy = scheduler(a, b, lanes=2)
    put(b, "b1", now=1)
    put(a, "a1", "a2", now=2)
    assert take(policy, now=3) == ["b1"]
    assert take(policy, now=3) == ["a1", "a2"]


def test_streams_share_what_waits() -> None:
    q = queue(max_batch_size=8)
    policy = scheduler(q, lanes=2, cpu=True)
    put(q, "a", "b", "c", "d", "e")
    assert take(policy) == ["a", "b", "c"]
    assert take(policy) == ["d"]


def test_a_lone_image_has_all_cores_in_lane_0_while_the_others_keep_still() -> None:
    q = queue()
    policy = scheduler(q, lanes=2, cpu=True)
    put(q, "a", now=1)
    assert policy.next_batch(1, lane=1) == (None, [])
    batch, _ = policy.next_batch(1, lane=0)
    assert batch is not None
    assert batch.wide
    put(q, "b", now=1.5)
    assert policy.next_batch(1.5, lane=1) == (None, [])
    policy.finish(batch, 2)
    # b had to wait, so more are on the way: side by side they get through sooner
    narrow, _ = policy.next_batch(2, lane=1)
    assert narrow is not None
    assert not narrow.wide


def test_what_cannot_take_more_threads_never_runs_wide() -> None:
    q = queue(runs_wide=False)
    policy = scheduler(q, lanes=2, cpu=True)
    put(q, "a", now=1)
    batch, _ = policy.next_batch(1, lane=1)
    assert batch is not None
    assert not batch.wide


def test_company_in_any_queue_means_narrow_lanes() -> None:
    a, b = queue("a"), queue("b")
    policy = scheduler(a, b, lanes=2, cpu=True)
    put(a, "x")
    put(b, "y")
    batches = [policy.next_batch(0, lane)[0] for lane in (1, 0)]
    assert [names(batch) for batch in batches] == [["x"], ["y"]]
    assert not any(batch.wide for batch in batches if batch)


class Idle(BatchQueue):
    def due(self) -> float:
        raise AssertionError("an idle queue was looked at")


def test_a_batch_gathers_while_decoding_takes_all_cores() -> None:
    q = queue(max_batch_size=2 * GATHER_IMAGES)
    policy = scheduler(q, lanes=2, cpu=True)
    q.places.take("", 2 * GATHER_IMAGES + 2, bulk=False)  # more will be decoded
    first, *rest = (Entry(str(n), n) for n in range(2 * GATHER_IMAGES))
    q.put(first, 1.0)
    assert take(policy, now=1.0) == []
    assert policy.next_due() == pytest.approx(1.0 + GATHER_S)
    for entry in rest:
        q.put(entry, 1.001)
    assert take(policy, now=1.001) == [str(n) for n in range(GATHER_IMAGES)], (
        "that many a lane are enough"
    )


def test_a_batch_that_gathers_waits_briefly_and_only_while_others_are_being_decoded() -> None:
    q = queue()
    policy = scheduler(q, lanes=2, cpu=True)
    q.places.take("", 3, bulk=False)
    q.put(Entry("a"), 1.0)
    assert take(policy, now=1.0 + GATHER_S / 2) == []
    assert take(policy, now=1.0 + GATHER_S) == ["a"]
    q.put(Entry("b"), 2.0)
    assert take(policy, now=2.0) == ["b"], "one that is decoded leaves a core free"
    q.places.give_back("", 1, bulk=False)

    policy.finish(policy.running[0], 2.0)
    policy.finish(policy.running[0], 2.0)
    q.places.take("", 3, bulk=False)
    q.put(Entry("c"), 3.0)
    q.places.give_back("", 2, bulk=False)  # could not be decoded
    assert take(policy, now=3.0) == ["c"]


def test_a_gpu_does_not_gather() -> None:
    q = queue()
    policy = scheduler(q, lanes=2)
    q.places.take("", 8, bulk=False)
    q.put(Entry("a"), 1.0)
    assert take(policy, now=1.0) == ["a"]


class NotListed(dict[str, BatchQueue]):
    """Queues that are asked for by name alone."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("looks at every queue")

    def values(self) -> Any:
        raise AssertionError("looks at every queue")

    items = keys = values


def test_dispatch_looks_only_at_queues_that_hold_something() -> None:
    idle = [Idle(str(number), max_batch_size=8, capacity=64) for number in range(1000)]
    busy = queue("busy")
    policy = scheduler(*idle, busy)
    put(busy, "a", "b")
    assert take(policy) == ["a", "b"]
    assert not policy.is_waiting


def test_the_estimate_of_queued_work_follows_what_batches_cost() -> None:
    q = queue()
    policy = scheduler(q, lanes=2)
    put(q, "a", "b")
    batch, _ = policy.next_batch(0)
    assert batch is not None
    policy.finish(batch, 1.0)  # half a second an image
    q.places.take("", 8, bulk=False)
    assert policy.queue_seconds() == pytest.approx(8 * 0.5 / 2)


def test_the_work_that_waits_is_the_sum_over_all_queues_whatever_happens() -> None:
    chance = random.Random(2)
    queues = [queue(str(number), max_batch_size=4) for number in range(5)]
    policy, now = scheduler(*queues, lanes=2), 0.0
    policy.queues = NotListed(policy.queues)

    def work(decoded: bool) -> list[dict[str, float]]:
        sums: list[dict[str, float]] = [{}, {}]
        for q in queues:
            each = q.costs.per_image(min(q.admitted, 4)) if q.admitted else 0.0
            waiting = (q.decoded.interactive.counts, q.decoded.bulk.counts)
            for total, counts in zip(
                sums, waiting if decoded else (q.places.interactive, q.places.bulk), strict=True
            ):
                for client, count in counts.items():
                    total[client] = total.get(client, 0.0) + count * each
        return sums

    for _ in range(1000):
        q, now = chance.choice(queues), now + chance.random()
        client, bulk = chance.choice("abc"), chance.random() < 0.3
        if chance.random() < 0.5 and q.admitted < 30:
            put(q, "x", now=now, client=client, bulk=bulk)
        if chance.random() < 0.2 and q.admitted < 30:
            q.places.take(client, 2, bulk=bulk)  # they are being decoded
            q.places.give_back(client, 1, bulk=bulk)
            put(q, "y", now=now, client=client, bulk=bulk)
            q.places.give_back(client, 1, bulk=bulk)
        if chance.random() < 0.5:
            policy.next_batch(now)
        if policy.running and chance.random() < 0.5:
            policy.finish(chance.choice(policy.running), now)
        for decoded in (False, True):
            interactive, waiting_bulk = work(decoded)
            ahead = work_ahead(interactive, waiting_bulk, client, 0.5, is_bulk=bulk)
            running = sum(policy._remaining(batch, now) for batch in policy.running)
            found = policy.seconds_ahead(client, 0.5, now, bulk=bulk, decoded=decoded)
            assert found == pytest.approx((ahead + running) / 2, abs=1e-6)
        seconds = sum(sum(part.values()) for part in work(False)) / 2
        assert policy.queue_seconds() == pytest.approx(seconds, abs=1e-6)
    while any(map(len, queues)) or policy.running:
        policy.next_batch(now)
        for batch in list(policy.running):
            policy.finish(batch, now)
    assert policy.queue_seconds() == 0
    assert policy.seconds_ahead("a", 0.5, now, bulk=False) == 0


def test_nothing_is_lost_or_run_twice_whatever_happens() -> None:
    chance = random.Random(1)
    for _ in range(200):
        q = queue(max_batch_size=chance.randint(1, 5), capacity=30)
        policy = scheduler(q, lanes=chance.randint(1, 3), cpu=chance.random() < 0.5)
        admitted, ended, now = [], [], 0.0
        for step in range(80):
            now += chance.random()
            if chance.random() < 0.6 and q.admitted < 30:
                deadline = now + chance.random() * 5 if chance.random() < 0.3 else math.inf
                bulk = chance.random() < 0.3
                flow = str(chance.randint(0, 3))
                admitted += put(q, str(step), now=now, flow=flow, deadline=deadline, bulk=bulk)
            if chance.random() < 0.5:
                batch, dead = policy.next_batch(now)
                ended += dead + (batch.entries if batch else [])
            if policy.running and chance.random() < 0.5:
                policy.finish(chance.choice(policy.running), now)
        while len(q):
            for running in list(policy.running):
                policy.finish(running, now)
            batch, dead = policy.next_batch(now)
            ended += dead + (batch.entries if batch else [])
        assert sorted(e.payload for e in ended) == sorted(e.payload for e in admitted)
        assert q.admitted == 0
