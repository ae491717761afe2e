"""While answers come late, the deadlines of further requests are set earlier."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from service.gateway import lateness
from service.gateway.json_response import made_of
from service.gateway.lateness import MAX_RESERVE_S, STEP_S, Lateness
from service.gateway.rest import task_routes
from tests.conftest import running
from tests.service.test_engine import post


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_answers_in_time_need_no_reserve() -> None:
    late = Lateness(Clock())
    late.answered(deadline=100.0)
    assert late.reserve_s(60.0) == 0


def test_late_answers_add_to_the_reserve_up_to_a_bound() -> None:
    late = Lateness(Clock())
    for _ in range(3):
        late.answered(deadline=99.9)
    assert late.reserve_s(60.0) == pytest.approx(3 * STEP_S)
    for _ in range(1000):
        late.answered(deadline=99.9)
    assert late.reserve_s(60.0) == MAX_RESERVE_S
    assert late.reserve_s(0.4) == pytest.approx(0.1)


def test_the_reserve_falls_while_no_answer_is_late() -> None:
    late = Lateness(clock := Clock())
    late.answered(deadline=99.9)
    clock.now += 10
    assert late.reserve_s(60.0) == pytest.approx(STEP_S * 0.368, rel=1e-2)
    late.answered(deadline=200.0)
    clock.now += 90
    assert late.reserve_s(60.0) < 1e-6


def test_a_request_after_a_late_answer_has_less_time(
    tiny_catalog: Path, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"STEP_S": 600.0, "MAX_RESERVE_S": 600.0, "MAX_SHARE": 1.0}.items():
        monkeypatch.setattr(lateness, name, value)
    with running(tiny_catalog) as server:
        server.wait_ready()
        delay_s = 0.0

        async def slowly(*arguments: Any) -> Any:
            answer = await made_of(*arguments)
            await asyncio.sleep(delay_s)
            return answer

        monkeypatch.setattr(task_routes, "made_of", slowly)

        def ask(timeout_ms: int) -> int:
            headers = {"X-Timeout-Ms": str(timeout_ms)}
            return post(server, "/classify", jpegs["coffee"], headers=headers).status_code

        # Neither what asks no model nor what is in time changes anything.
        headers = {"X-Timeout-Ms": "0.001"}
        assert server.client.post("/v2/repository/index", headers=headers).status_code == 200
        assert ask(500_000) == 200
        delay_s = 3.1
        assert ask(3_000) == 200
        delay_s = 0.0
        assert ask(500_000) == 504
        assert ask(700_000) == 200
