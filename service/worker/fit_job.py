"""One fit of a head: a zip file in the folder of heads until it ends, locked by who works on it."""

import json
import logging
import threading
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from models.fitting.dataset import Progress

logger = logging.getLogger(__name__)

# The archive's member that holds the request.
JOB = "vitrail-fit.json"
SUFFIX = ".fit.zip"


@dataclass(slots=True)
class FitJob:
    """A fit. `lock` is held until it ends, since other processes may see its file too."""

    name: str
    path: Path
    lock: FileLock
    state: str = "queued"
    reason: str = ""
    progress: Progress | None = None
    request: dict[str, Any] = field(default_factory=dict)
    cancelled: threading.Event = field(default_factory=threading.Event)
    finished: bool = False

    def release(self, *, ended: bool) -> None:
        """Release the lock.

        Args:
            ended: False if another process is to resume the job.
        """
        _release(self.lock, ended)


def claim(name: str, path: Path) -> FitJob | None:
    """The job of a file, locked; None if another process has it, or it cannot be read."""
    lock = FileLock(path.with_name(f".{name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            request = json.loads(archive.read(JOB))
    except FileNotFoundError:  # another process has finished it meanwhile
        _release(lock, ended=True)
        return None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        logger.error("%s is not a readable job: %s", path, error)
        path.unlink(missing_ok=True)
        _release(lock, ended=True)
        return None
    return FitJob(name, path, lock, request=request)


def _release(lock: FileLock, ended: bool) -> None:
    """Release a lock, and delete its file if the job has ended, so that none is left for each name
    that was ever fitted. A process that opened the file before can lock it, and then finds no job.
    """
    if ended:
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
