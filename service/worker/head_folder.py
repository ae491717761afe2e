"""The folder that heads' files are in, and which of them have changed since they were read."""

import os
import re
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from pathlib import Path

from models.heads.files import write_whole

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SUFFIX = ".safetensors"

INTERVAL_S = 1.0
# Looking at all files of the folder takes at most this share of one core.
SCAN_SHARE = 0.02

# Modification time in ns and size in bytes.
Stamp = tuple[int, int]


class Change(Enum):
    """What has become of a file since it was looked at last."""

    NONE = "none"
    WRITTEN = "written"
    DELETED = "deleted"


class HeadFolder:
    """Heads' files by name, which other processes may write, too.

    Attributes:
        root: the folder.
        nbytes: bytes of all files that exist, as far as they were looked at.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nbytes = 0
        # Of each file, when it was looked at last.
        self._stamps: dict[str, Stamp] = {}
        # Files that have changed since.
        self._pending: dict[str, None] = {}
        # When all files are looked at again, in `time.monotonic` seconds.
        self._next_scan = 0.0

    def __contains__(self, name: str) -> bool:
        return name in self._stamps

    def __len__(self) -> int:
        return len(self._stamps)

    def names(self) -> Iterable[str]:
        """The heads whose files exist, as far as they were looked at."""
        return list(self._stamps)

    def file(self, name: str) -> Path:
        """A head's file."""
        return self.root / f"{name}{SUFFIX}"

    def report(self, name: str) -> Path:
        """The folder of what a fit reports of a head."""
        return self.root / f"{name}.report"

    def write(self, name: str, content: bytes) -> None:
        """Write a head's file, and remove what was reported of the one before."""
        self.root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.report(name), ignore_errors=True)
        write_whole(self.file(name), content)

    def delete(self, name: str) -> None:
        """Delete a head's file and its report, if they exist."""
        self.file(name).unlink(missing_ok=True)
        shutil.rmtree(self.report(name), ignore_errors=True)

    def scan(self) -> bool:
        """Find the files that are new, changed or gone. Does nothing, and returns False, if that
        was done just now."""
        if time.monotonic() < self._next_scan:
            return False
        started = time.thread_time()
        found: dict[str, Stamp] = {}
        with suppress(FileNotFoundError), os.scandir(self.root) as files:
            for file in files:
                name = file.name.removesuffix(SUFFIX)
                if name == file.name or not NAME.fullmatch(name):
                    continue
                with suppress(OSError):  # deleted meanwhile
                    found[name] = _stamp(file.stat())
        changed = {name for name, stamp in found.items() if self._stamps.get(name) != stamp}
        changed |= self._stamps.keys() - found.keys()
        self._pending |= dict.fromkeys(sorted(changed))
        pause_s = max(INTERVAL_S, (time.thread_time() - started) / SCAN_SHARE)
        self._next_scan = time.monotonic() + pause_s
        return True

    def pending(self) -> str | None:
        """A file that `scan` has found to have changed, and that was not looked at since."""
        return next(iter(self._pending), None)

    def look(self, name: str) -> Change:
        """What has become of a head's file."""
        self._pending.pop(name, None)
        old = self._stamps.get(name)
        try:
            stamp = _stamp(self.file(name).stat())
        except OSError:
            if old is None:
                return Change.NONE
            self.nbytes -= self._stamps.pop(name)[1]
            return Change.DELETED
        if stamp == old:
            return Change.NONE
        self._stamps[name] = stamp
        self.nbytes += stamp[1] - (old[1] if old else 0)
        return Change.WRITTEN


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_size
