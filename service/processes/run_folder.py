"""The folder of a supervisor's sockets and metrics."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MEMORY = Path("/dev/shm")  # nosec B108: a folder of its own is made in it
PREFIX = "vitrail-run-"
# A file that the supervisor and its children hold locked. The kernel unlocks it when the last of
# them has ended, however they end.
LOCK = "lock"


@contextmanager
def run_folder() -> Iterator[tuple[Path, int]]:
    """A new folder, removed at the end, with the descriptor of its lock for children to inherit.

    Folders of supervisors that were killed are removed first, once their children have ended, too.
    """
    parent = _parent()
    for folder in parent.glob(f"{PREFIX}*"):
        _remove_if_stale(folder)
    folder, lock = _locked(parent)
    try:
        yield folder, lock
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _parent() -> Path:
    """In memory, unless TMPDIR says otherwise. Metrics are mapped files, and one that cannot grow
    on a full disk ends its process."""
    in_memory = "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK | os.X_OK)
    return MEMORY if in_memory else Path(tempfile.gettempdir())


def _locked(parent: Path) -> tuple[Path, int]:
    """A new folder and the descriptor of its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return folder, lock
        os.close(lock)  # another supervisor took the folder for a stale one before it was locked


def _remove_if_stale(folder: Path) -> None:
    """Remove a folder of this user that nobody holds locked."""
    with suppress(OSError):  # another user's, or gone by now
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(lock).st_uid == os.geteuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        finally:
            os.close(lock)
