"""While the event loop is behind, requests of clients with many connections are refused unread."""

import re
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.accounting import counted
from service.errors import QueueFullError, ServiceError, UnavailableError
from service.gateway.loop_turns import LoopTurns
from service.gateway.shedding import FEW_CONNECTIONS, FULL_S, MAX_WORK_S, Shedding
from service.holdings import Holdings
from service.metrics import Metrics
from tests.conftest import running, wait_until
from tests.service.test_engine import post

BEHIND_S = 2 * MAX_WORK_S


@pytest.mark.parametrize(
    ("method", "client", "flood", "work_s", "full_for_s", "expected"),
    [
        ("POST", "flood", FEW_CONNECTIONS, BEHIND_S, 0, True),
        ("POST", "one", FEW_CONNECTIONS, BEHIND_S, 0, False),
        ("GET", "flood", FEW_CONNECTIONS, BEHIND_S, 0, False),
        ("POST", "flood", FEW_CONNECTIONS, MAX_WORK_S, 0, False),
        ("POST", "flood", FEW_CONNECTIONS - 1, BEHIND_S, 0, False),
        ("POST", "flood", FEW_CONNECTIONS, BEHIND_S, FULL_S, False),
    ],
    ids=["flood", "another client", "health", "not behind", "few connections", "not full"],
)
def test_who_is_refused(
    method: str,
    client: str,
    flood: int,
    work_s: float,
    full_for_s: float,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = Holdings(10_000)
    held.take("flood", flood)
    held.take("one", 1)
    monkeypatch.setattr(LoopTurns, "work_s", lambda turns: work_s)
    metrics = Metrics(CollectorRegistry())
    metrics.queue_full_at = time.monotonic() - full_for_s
    assert Shedding(held, LoopTurns(), metrics).sheds(method, client) is expected


def test_many_clients_with_a_connection_each_are_refused_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = Holdings(10_000)
    for number in range(FEW_CONNECTIONS + 1):
        held.take(str(number), 1)
    monkeypatch.setattr(LoopTurns, "work_s", lambda turns: BEHIND_S)
    metrics = Metrics(CollectorRegistry())
    metrics.queue_full_at = time.monotonic()
    assert Shedding(held, LoopTurns(), metrics).sheds("POST", "7")


def test_refusals_for_a_full_queue_are_noticed() -> None:
    metrics = Metrics(CollectorRegistry())
    began = time.monotonic()
    for error in (UnavailableError("x"), QueueFullError("x")):
        assert metrics.queue_full_at < began
        with (
            pytest.raises(ServiceError),
            counted(metrics, lambda name: False, "classify", began),
        ):
            raise error
    assert metrics.queue_full_at >= began


def test_the_connection_of_a_refused_request_stays(
    tiny_catalog: Path,
    jpegs: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(tiny_catalog) as server:
        server.wait_ready()
        refused = True
        monkeypatch.setattr(Shedding, "sheds", lambda *_: refused)
        for sent, request_id in (('my-"id"', 'my-"id"'), ("not an id", "[0-9a-f]{32}")):
            headers = {"X-Request-ID": sent}
            answer = post(server, "/classify", jpegs["coffee"], headers=headers)
            assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
            assert answer.json()["type"] == "urn:vitrail:problem:queue-full"
            assert re.fullmatch(request_id, answer.json()["request_id"])
            assert answer.headers["X-Request-ID"] == answer.json()["request_id"]
        wait_until(lambda: "too many requests at once: 2 were refused unread" in caplog.text)
        refused = False
        assert post(server, "/classify", jpegs["coffee"]).status_code == 200
        assert "vitrail_shed_requests_total 2.0" in server.client.get("/metrics").text
