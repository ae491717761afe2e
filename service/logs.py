"""Log lines: JSON, each with its request's id, or text where a person reads them."""

import atexit
import json
import logging
import random
import re
import sys
import threading
import time
from contextlib import suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from service import tracing

request_id: ContextVar[str] = ContextVar("request_id", default="")

# Printable ASCII without spaces: cannot forge log lines or headers.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_STANDARD = logging.LogRecord("", 0, "", 0, "", (), None).__dict__.keys() | {
    "message",
    "taskName",
    "color_message",  # uvicorn's message with colours
}


def choose_request_id(candidate: str) -> str:
    """The caller's request id if it is safe to log and to send back, otherwise a new one."""
    if candidate and _REQUEST_ID.fullmatch(candidate):
        return candidate
    return f"{random.getrandbits(128):032x}"  # uuid4 would be a system call


def access_level(usual: int, duration_s: float, slow_s: float) -> int:
    """The level of an access log line: WARNING for a slow request.

    Args:
        slow_s: the setting `slow_request_s`; 0 if no request is slow.
    """
    return logging.WARNING if 0 < slow_s <= duration_s else usual


class JsonFormatter(logging.Formatter):
    """One JSON object for each line: time, level, logger, message, and the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            line["request_id"] = current
        line |= tracing.exemplar(tracing.current()) or {}
        line |= {k: v for k, v in record.__dict__.items() if k not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TerminalFormatter(logging.Formatter):
    """A line for a person: the time, the level from warnings on, and the message."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        line = f"{time.strftime('%H:%M:%S')}  {level}{record.getMessage()}"
        if "status" in record.__dict__:
            line += f"  {record.__dict__['status']}"
        if "duration_s" in record.__dict__:  # the audit's lines have none
            line += f"  {record.__dict__['duration_s']:.3f} s"
        if record.exc_info:
            line += f"\n{self.formatException(record.exc_info)}"
        return line


class BufferedHandler(logging.StreamHandler[Any]):
    """Writes lines to standard error in the background, several at a time.

    A write is a system call, after which a busy process waits for its interpreter again; at a
    thousand requests a second that takes longer than the requests' own work. Lines of warnings and
    errors are written before `emit` returns, with the lines before them.
    """

    INTERVAL_S = 0.1

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []
        self._filled = threading.Event()
        self._writing = threading.Lock()
        threading.Thread(target=self._write_on, name="log-writer", daemon=True).start()
        atexit.register(self.flush)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + self.terminator
            self._lines.append(line)  # in one step: `flush` may take the list between two
        except Exception:
            self.handleError(record)
        if record.levelno >= logging.WARNING:
            self.flush()
        elif not self._filled.is_set():
            self._filled.set()

    def flush(self) -> None:
        with self._writing:
            lines, self._lines = self._lines, []
            if lines:
                with suppress(ValueError):  # the stream is closed, as at the end of a process
                    self.stream.write("".join(lines))
                    self.stream.flush()

    def _write_on(self) -> None:
        while True:
            self._filled.wait()
            time.sleep(self.INTERVAL_S)
            self._filled.clear()
            self.flush()


def configure_logs(level: str) -> None:
    """Log to standard error: as JSON lines, or as text to a terminal. Called once, when the
    process starts."""
    handler = BufferedHandler()
    terminal = sys.stderr.isatty()
    handler.setFormatter(TerminalFormatter() if terminal else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Their own levels, because OpenVINO raises the root logger's while it converts a pass.
    for own in ("vitrail", "service", "models", "uvicorn"):
        logging.getLogger(own).setLevel(level.upper())
    logging.getLogger("vitrail.audit").setLevel(logging.INFO)  # whatever the level
    noisy = ["httpx", "httpcore", "PIL", "rasterio", "filelock", "matplotlib"]
    if terminal:  # service/cli/summary.py says what it would
        noisy.append("uvicorn")
    for name in noisy:
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns of a missing loss, which only training needs, when an engine looks at the network.
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
