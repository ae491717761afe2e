"""What a gateway remembers of its workers' refusals. Time is the test's own."""

from types import SimpleNamespace
from typing import Any

import pytest

from service.clients import client
from service.errors import QueueFullError
from service.remote.refusals import MAX_S, Refusals
from service.types import Call, InferRequest

MODELS: Any = {"tiny": SimpleNamespace(trunk="trunk")}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def refused(refusals: Refusals, *, images: int = 1, remaining_s: float = 1.0) -> None:
    request = InferRequest(
        inputs=[b"image"] * images, calls=[Call("tiny", "classify", {})], deadline=9
    )
    error = QueueFullError("the queue is full", retry_after_s=2.0)
    refusals.add(request, MODELS, remaining_s, error)


def test_a_refusal_holds_for_a_tenth_of_the_wait_and_a_quarter_of_a_second_at_most() -> None:
    for remaining_s, seconds in ((1.0, 0.1), (60.0, 0.2), (0.5, 0.05)):
        clock = Clock()
        refusals = Refusals(clock)
        refused(refusals, remaining_s=remaining_s)
        clock.now = 0.99 * seconds
        assert refusals.find("trunk", bulk=False, remaining_s=remaining_s)
        clock.now = 1.01 * seconds
        assert refusals.find("trunk", bulk=False, remaining_s=remaining_s) is None
    assert MAX_S == 0.25


def test_who_has_more_time_or_another_queue_is_not_refused() -> None:
    refusals = Refusals(Clock())
    refused(refusals)
    assert refusals.find("trunk", bulk=False, remaining_s=1.0)
    assert refusals.find("trunk", bulk=False, remaining_s=2.0) is None
    assert refusals.find("trunk", bulk=True, remaining_s=1.0) is None
    assert refusals.find("other", bulk=False, remaining_s=1.0) is None
    token = client.set("another")
    assert refusals.find("trunk", bulk=False, remaining_s=1.0) is None
    client.reset(token)


def test_one_image_may_have_a_place_where_several_have_none() -> None:
    refusals = Refusals(Clock())
    refused(refusals, images=2)
    assert refusals.find("trunk", bulk=False, remaining_s=1.0) is None


def test_the_error_says_that_another_image_was_refused() -> None:
    refusals = Refusals(Clock())
    refused(refusals)
    error = refusals.find("trunk", bulk=False, remaining_s=1.0)
    assert error is not None
    assert "another image" in error.detail
    assert error.retry_after_s == pytest.approx(2.0)
