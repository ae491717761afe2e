"""Faults of processes: they are killed, stopped and slowed down."""

import os
import signal
import time

from benchmarks.chaos.faults.fault import FAULT_S
from benchmarks.chaos.target import Target, wait_until


def killed(kind: str, target: Target) -> None:
    target.replaced(kind, signal.SIGKILL)


def stopped(kind: str, target: Target) -> None:
    """Nobody but the server itself ends what hangs."""
    target.replaced(kind, signal.SIGSTOP)


def decoders_stopped(target: Target) -> None:
    """Those that get an image are replaced; others may never get one."""
    victims = target.pids("decoder")
    for victim in victims:
        os.kill(victim, signal.SIGSTOP)
    wait_until(lambda: not set(victims) <= set(target.pids("decoder")))
    for victim in set(victims) & set(target.pids("decoder")):
        os.kill(victim, signal.SIGCONT)


def worker_slows_down(target: Target) -> None:
    """It runs for a tenth of the time."""
    victim = target.pids("worker")[0]
    end = time.monotonic() + FAULT_S
    while time.monotonic() < end:
        os.kill(victim, signal.SIGSTOP)
        time.sleep(0.18)
        os.kill(victim, signal.SIGCONT)
        time.sleep(0.02)


def workers_killed(target: Target) -> None:
    for victim in target.pids("worker"):
        os.kill(victim, signal.SIGKILL)
    target.wait_whole()


def workers_restarted(target: Target) -> None:
    """One by one."""
    before = set(target.pids("worker"))
    os.kill(target.pids("supervisor")[0], signal.SIGUSR1)
    wait_until(lambda: not before & set(target.pids("worker")))
    target.wait_whole()


def supervisor_stopped(target: Target) -> None:
    [victim] = target.pids("supervisor")
    os.kill(victim, signal.SIGSTOP)
    time.sleep(FAULT_S)
    os.kill(victim, signal.SIGCONT)
    target.wait_whole()


def supervisor_killed(target: Target) -> None:
    """Its children answer what they have accepted and end. An init starts it again."""
    [victim] = target.pids("supervisor")
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not any(map(target.pids, ("supervisor", "gateway", "worker", "decoder"))))
    target.start()
