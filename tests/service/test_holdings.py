"""Shares of what all clients hold together."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from service.errors import UnavailableError
from service.holdings import Holdings
from service.limits import Budget
from service.metrics import Metrics
from service.sampling import (
    IDLE_SAMPLES,
    LARGE_BYTES,
    RETURN_INTERVAL_S,
    MemoryReturn,
    sampling,
)
from service.settings import Settings


def test_a_client_below_its_share_gets_some_more_when_everything_is_taken() -> None:
    places = Holdings(16)
    places.take("greedy", 16)
    assert not places.fits("greedy", 1)
    places.take("modest", 1)
    assert places.fits("modest", 1)
    places.take("modest", 1)
    assert places.taken == 18
    assert not places.fits("modest", 1)  # half of a quarter, not more
    places.give_back("modest", 2)
    assert places.fits("third", 1)
    assert not places.fits("greedy", 1)
    places.give_back("greedy", 16)
    assert places.taken == 0


@pytest.mark.parametrize("capacity", [2048, 512 * 2**20])
def test_clients_who_take_all_they_can_leave_some_for_the_next(capacity: int) -> None:
    places = Holdings(capacity)
    for number in range(20):
        client = f"greedy {number}"
        assert places.fits(client, 1)
        while places.fits(client, 1):
            size = 1
            while places.fits(client, 2 * size):
                size *= 2
            places.take(client, size)
    assert capacity < places.taken <= capacity + capacity // 4
    assert places.fits("modest", 1)


def test_of_few_places_there_is_one_more_too() -> None:
    places = Holdings(2)
    places.take("greedy", 2)
    assert places.fits("modest", 1)
    places.take("modest", 1)
    assert not places.fits("modest", 1)
    assert not places.fits("greedy", 1)


def test_a_client_alone_has_everything_and_no_more() -> None:
    places = Holdings(4)
    assert places.fits("alone", 4)
    assert not places.fits("alone", 5)
    places.take("alone", 4)
    assert not places.fits("alone", 1)


def test_what_is_less_than_its_share_depends_on_the_number_of_clients() -> None:
    places = Holdings(8)
    for client in "abcd":
        places.take(client, 2)
    assert not places.fits("a", 1)
    assert places.fits("e", 1)
    assert not places.fits("e", 2)  # of five clients, each has one


def test_one_clients_requests_and_bytes_leave_room_for_others() -> None:
    settings = Settings(max_requests_in_flight=4, max_bytes_in_flight=4000, max_request_bytes=4000)
    budget = Budget(settings)
    with budget.request("http", "greedy") as share:
        share.add(4000)
        with budget.request("http", "greedy") as second, pytest.raises(UnavailableError):
            second.add(1)
        with budget.request("grpc", "modest") as other:
            other.add(500)
            with pytest.raises(UnavailableError):
                other.add(1)
        assert budget.bytes == 4000
    assert (budget.bytes, budget.requests) == (0, 0)


def test_the_memory_of_large_bodies_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[int] = []

    async def case() -> None:
        budget = Budget(Settings())
        with budget.request("http", "a") as share:
            share.add(LARGE_BYTES)
        assert budget.peak_bytes == LARGE_BYTES
        async with sampling(Metrics(CollectorRegistry()), budget):
            await asyncio.sleep(0.05)
            assert not returned
            with budget.request("http", "a") as share:
                share.add(LARGE_BYTES + 1)
            while not returned or budget.peak_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    monkeypatch.setattr("service.sampling.INTERVAL_S", 0.005)
    monkeypatch.setattr("service.sampling.return_freed_memory", lambda: returned.append(1))
    asyncio.run(asyncio.wait_for(case(), 20))


def test_memory_is_not_given_back_while_requests_come() -> None:
    budget = Budget(Settings())
    memory = MemoryReturn(budget)
    with budget.request("http", "a") as share:
        share.add(LARGE_BYTES + 1)
    for _ in range(IDLE_SAMPLES):
        with budget.request("grpc", "b"):  # a small one, of which the network may be running
            assert not any(memory.is_due(0.0) for _ in range(2 * IDLE_SAMPLES))
        assert not any(memory.is_due(0.0) for _ in range(IDLE_SAMPLES - 1))
    assert memory.is_due(0.0)
    assert not any(memory.is_due(RETURN_INTERVAL_S) for _ in range(2 * IDLE_SAMPLES))
    with budget.request("http", "a") as share:
        share.add(LARGE_BYTES + 1)
    assert not memory.is_due(RETURN_INTERVAL_S / 2)  # too early
    assert memory.is_due(RETURN_INTERVAL_S)
