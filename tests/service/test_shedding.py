"""Requests are refused unread while the event loop is behind, and only those of who floods it."""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.gateway.loop_turns import LoopTurns
from service.gateway.shedding import FEW_CONNECTIONS, MAX_WORK_S, Shedding
from service.holdings import Holdings
from service.metrics import Metrics
from tests.conftest import running
from tests.service.test_engine import post

BEHIND_S = 2 * MAX_WORK_S


@pytest.mark.parametrize(
    ("method", "client", "flood", "work_s", "expected"),
    [
        ("POST", "flood", FEW_CONNECTIONS, BEHIND_S, True),
        ("POST", "one", FEW_CONNECTIONS, BEHIND_S, False),
        ("GET", "flood", FEW_CONNECTIONS, BEHIND_S, False),
        ("POST", "flood", FEW_CONNECTIONS, MAX_WORK_S, False),
        ("POST", "flood", FEW_CONNECTIONS - 1, BEHIND_S, False),
    ],
    ids=["flood", "another client", "health", "not behind", "few connections"],
)
def test_who_is_refused(
    method: str,
    client: str,
    flood: int,
    work_s: float,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = Holdings(10_000)
    held.take("flood", flood)
    held.take("one", 1)
    monkeypatch.setattr(LoopTurns, "work_s", lambda turns: work_s)
    shedding = Shedding(held, LoopTurns(), Metrics(CollectorRegistry()))
    assert shedding.wants(method, client) is expected


def test_many_clients_with_a_connection_each_are_refused_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = Holdings(10_000)
    for number in range(FEW_CONNECTIONS + 1):
        held.take(str(number), 1)
    monkeypatch.setattr(LoopTurns, "work_s", lambda turns: BEHIND_S)
    assert Shedding(held, LoopTurns(), Metrics(CollectorRegistry())).wants("POST", "7")


def test_the_connection_of_a_refused_request_stays(
    tiny_catalog: Path, jpegs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_catalog) as server:
        server.wait_ready()
        refused = True
        monkeypatch.setattr(Shedding, "wants", lambda *_: refused)
        answer = post(server, "/classify", jpegs["coffee"])
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert answer.json()["type"] == "urn:vitrail:problem:unavailable"
        refused = False
        assert post(server, "/classify", jpegs["coffee"]).status_code == 200
        assert "vitrail_shed_requests_total 1.0" in server.client.get("/metrics").text
