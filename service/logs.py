"""JSON log lines, each with its request's id."""

import json
import logging
import re
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime

request_id: ContextVar[str] = ContextVar("request_id", default="")

# Printable ASCII without spaces: cannot forge log lines or headers.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_STANDARD = logging.LogRecord("", 0, "", 0, "", (), None).__dict__.keys() | {"message", "taskName"}


def choose_request_id(candidate: str) -> str:
    """The caller's request id if it is safe to log and to send back, otherwise a new one."""
    return candidate if _REQUEST_ID.fullmatch(candidate) else uuid.uuid4().hex


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
        line |= {k: v for k, v in record.__dict__.items() if k not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logs(level: str) -> None:
    """Log to standard error as JSON lines. Called once, when the process starts."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "PIL", "rasterio", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
