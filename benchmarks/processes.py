"""Processor time and memory of processes, from Linux's /proc."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Usage:
    """What processes have used.

    Args:
        cpu_s: processor time, with that of children that have ended.
        resident_bytes: resident memory. Shared pages count once for each process.
    """

    cpu_s: float = 0.0
    resident_bytes: int = 0


def marked_processes(variable: str, value: str) -> list[int]:
    """The ids of running processes that have this environment variable.

    A variable is inherited by all descendants, also by those whose parent has ended.
    """
    mark = f"{variable}={value}".encode()
    return [pid for pid in _pids() if mark in _read(pid, "environ").split(b"\0")]


def usage(pids: list[int]) -> Usage:
    """The sum over processes. Those that have ended count as nothing."""
    cpu_ticks = pages = 0
    for pid in pids:
        if fields := _read(pid, "stat").rpartition(b")")[2].split():  # the name may hold spaces
            cpu_ticks += sum(map(int, fields[11:15]))
            pages += int(fields[21])
    return Usage(cpu_ticks / TICKS_PER_S, pages * PAGE_BYTES)


def machine_cpu_s() -> float:
    """The processor time of everything on the machine since it started."""
    line = Path("/proc/stat").read_text().partition("\n")[0]
    ticks = [int(field) for field in line.split()[1:9]]
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / TICKS_PER_S


def _pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def _read(pid: int, name: str) -> bytes:
    """A file of a process; empty if the process has ended or belongs to another user."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
