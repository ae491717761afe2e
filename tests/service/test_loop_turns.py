"""A request's deadline counts from when it may have come, not from when the event loop read it."""

import asyncio
from pathlib import Path

import pytest

from service.gateway.loop_turns import LoopTurns
from tests.conftest import running
from tests.service.test_engine import post


def test_a_long_turn_is_measured_and_soon_forgotten() -> None:
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    async def measure() -> list[float]:
        turns, loop = LoopTurns(lambda: now), asyncio.get_running_loop()
        seen = [turns.seconds()]
        turns.received(loop)
        loop.call_soon(work, 0.5)
        for _ in range(3):
            await asyncio.sleep(0)
        seen.append(turns.seconds())
        work(0.6)
        return [*seen, turns.seconds()]

    assert asyncio.run(measure()) == [0.0, 0.5, 0.0]


def test_the_work_of_the_loops_thread_is_remembered_for_a_second() -> None:
    clock, thread_clock = iter([10.0, 10.4, 11.3, 11.5]), iter([2.0, 2.03])

    async def measure() -> list[float]:
        turns = LoopTurns(lambda: next(clock), lambda: next(thread_clock))
        turns.received(asyncio.get_running_loop())
        for _ in range(3):
            await asyncio.sleep(0)
        return [turns.work_s(), turns.work_s()]

    assert asyncio.run(measure()) == [pytest.approx(0.03), 0.0]


def test_what_waited_for_the_loop_has_less_time_left(
    tiny_catalog: Path, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoopTurns, "seconds", lambda turns: 600.0)
    with running(tiny_catalog) as server:
        server.wait_ready()
        for timeout_ms, status in (("500000", 504), ("700000", 200)):
            headers = {"X-Timeout-Ms": timeout_ms}
            assert post(server, "/classify", jpegs["coffee"], headers=headers).status_code == status
