"""Turns, places and costs, which need neither threads nor clocks."""

import pytest

from service.worker.costs import BatchCosts
from service.worker.places import Places, QueueFull
from service.worker.turns import Turns, Waiting, work_ahead


def take_all(turns: Turns[str] | Waiting[str], count: int) -> list[str]:
    return [turns.take() for _ in range(count)]


def test_clients_take_turns_whatever_the_number_of_their_requests() -> None:
    turns: Turns[str] = Turns()
    for number in range(4):
        turns.put(f"hog{number}", "hog", flow=number)
    turns.put("other", "other", flow=9)
    assert take_all(turns, 5) == ["hog0", "other", "hog1", "hog2", "hog3"]
    assert not turns


def test_the_requests_of_one_client_take_turns() -> None:
    turns: Turns[str] = Turns()
    for item, flow in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        turns.put(item, "same", flow)
    assert take_all(turns, 3) == ["a1", "b1", "a2"]


def test_counts_follow_what_is_put_taken_and_removed() -> None:
    turns: Turns[str] = Turns()
    for item in ("a", "b", "c"):
        turns.put(item, "client", "flow")
    assert turns.remove(lambda item: item == "b") == ["b"]
    assert turns.counts == {"client": 2}
    assert take_all(turns, 2) == ["a", "c"]
    assert not turns.counts


def test_bulk_has_one_turn_in_four() -> None:
    waiting: Waiting[str] = Waiting()
    for number in range(8):
        waiting.put("bulk", "b", number, bulk=True)
        waiting.put("user", "u", number, bulk=False)
    assert take_all(waiting, 8).count("bulk") == 2


def test_only_as_much_of_anothers_work_goes_before_as_a_client_has_itself() -> None:
    interactive = {"hog": 100.0, "small": 1.0}
    assert work_ahead(interactive, {}, "new", 2.0, is_bulk=False) == 3.0
    assert work_ahead(interactive, {}, "hog", 2.0, is_bulk=False) == 101.0
    assert work_ahead({}, {"bulk": 100.0}, "new", 3.0, is_bulk=False) == 1.0
    assert work_ahead(interactive, {}, "new", 1.0, is_bulk=True) == 3.0


def test_bulk_leaves_one_place_in_four_free() -> None:
    places = Places(8)
    places.take("a", 6, bulk=True)
    with pytest.raises(QueueFull):
        places.take("a", 1, bulk=True)
    places.take("a", 2, bulk=False)
    with pytest.raises(QueueFull):
        places.take("a", 1, bulk=False)


def test_a_client_with_less_than_its_share_gets_a_place_when_another_holds_all() -> None:
    places = Places(8)
    places.take("hog", 8, bulk=False)
    places.take("other", 2, bulk=False)
    for client in ("hog", "other", "third"):  # no more than a quarter beyond the capacity
        with pytest.raises(QueueFull):
            places.take(client, 1, bulk=False)
    places.give_back("hog", 8, bulk=False)
    places.give_back("other", 2, bulk=False)
    assert places.taken == 0
    assert not places.interactive


def test_costs_of_an_image_are_those_of_batches_of_about_its_size() -> None:
    costs = BatchCosts()
    assert costs.per_image(1) == 0
    costs.add(16, 16.0)
    assert costs.per_image(1) == 1.0
    costs.add(1, 4.0)
    assert costs.per_image(3) == 4.0
    assert costs.per_image(12) == 1.0


def test_a_slow_first_batch_is_soon_forgotten() -> None:
    costs = BatchCosts()
    costs.add(1, 10.0)
    for _ in range(6):
        costs.add(1, 0.1)
    assert costs.per_image(1) < 0.3
