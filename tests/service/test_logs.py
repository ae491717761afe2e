"""Log lines are written in the background, and none is lost."""

import asyncio
import io
import json
import logging
import subprocess
import sys
import time

import pytest
from prometheus_client import CollectorRegistry

from service.limits import Budget
from service.logs import (
    BufferedHandler,
    JsonFormatter,
    TerminalFormatter,
    access_level,
    choose_request_id,
)
from service.metrics import Metrics
from service.sampling import sampling
from service.settings import Settings
from tests.conftest import wait_until


def handler() -> tuple[BufferedHandler, io.StringIO]:
    made, stream = BufferedHandler(), io.StringIO()
    made.setStream(stream)
    made.setFormatter(JsonFormatter())
    return made, stream


def record(level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord("vitrail", level, "", 0, message, (), None)


def test_lines_are_written_together_soon_after() -> None:
    made, stream = handler()
    for number in range(3):
        made.emit(record(logging.INFO, str(number)))
    wait_until(lambda: stream.getvalue().count("\n") == 3)
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == list("012")


def test_a_warning_is_written_at_once_with_the_lines_before_it() -> None:
    made, stream = handler()
    made.emit(record(logging.INFO, "before"))
    made.emit(record(logging.WARNING, "warning"))
    messages = [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
    assert messages == ["before", "warning"]


def test_a_person_reads_the_status_and_the_time_that_a_line_has() -> None:
    access, audit = record(logging.INFO, "GET /models"), record(logging.INFO, "POST /heads")
    access.__dict__ |= {"status": 200, "duration_s": 0.0123}
    audit.__dict__ |= {"status": 202}
    assert TerminalFormatter().format(access).endswith("  GET /models  200  0.012 s")
    assert TerminalFormatter().format(audit).endswith("  POST /heads  202")


def test_lines_are_written_before_the_process_ends() -> None:
    program = (
        "import logging; from service.logs import configure_logs; configure_logs('info');"
        "logging.getLogger('vitrail').info('last words')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "last words" in result.stderr


def test_a_library_that_raises_the_root_level_does_not_silence_us() -> None:
    program = (
        "import logging; from service.logs import configure_logs; configure_logs('info');"
        "logging.getLogger().setLevel(logging.ERROR);"
        "logging.getLogger('vitrail.access').info('a request')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "a request" in result.stderr


def test_request_ids_are_the_callers_or_new_ones() -> None:
    assert choose_request_id("abc") == "abc"
    made = {choose_request_id("") for _ in range(100)}
    assert len(made) == 100
    assert all(len(each) == 32 for each in made)
    assert choose_request_id("forged\nline") != "forged\nline"


def test_colours_meant_for_terminals_are_left_out_of_json() -> None:
    made = record(logging.INFO, "started")
    made.color_message = "\x1b[36mstarted\x1b[0m"
    assert set(json.loads(JsonFormatter().format(made))) == {
        "time", "level", "logger", "pid", "message",
    }  # fmt: skip


def test_a_person_reads_text() -> None:
    made = record(logging.INFO, "POST /classify")
    made.status, made.duration_s = 200, 0.0123
    line = TerminalFormatter().format(made)
    assert line.partition("  ")[2] == "POST /classify  200  0.012 s"
    assert "warning: low" in TerminalFormatter().format(record(logging.WARNING, "low"))


def test_slow_requests_are_warnings() -> None:
    assert access_level(logging.INFO, 3.0, 2.0) == logging.WARNING
    assert access_level(logging.INFO, 1.0, 2.0) == logging.INFO
    assert access_level(logging.DEBUG, 100.0, 0.0) == logging.DEBUG


def test_the_lag_of_a_blocked_loop_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.sampling.INTERVAL_S", 0.01)
    metrics = Metrics(CollectorRegistry())

    async def block() -> None:
        async with sampling(metrics, Budget(Settings())):
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(time.sleep, 0.2)
            await asyncio.sleep(0.05)

    asyncio.run(block())
    [family] = metrics.loop_lag.collect()
    total = next(s.value for s in family.samples if s.name.endswith("_sum"))
    assert total > 0.1
