"""Ends a supervised process when its supervisor dies, even by SIGKILL."""

import ctypes
import os
import select
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1  # of linux/prctl.h

# Seconds beyond the time to drain after which the process is ended by force.
GRACE_S = 10


def end_with_parent(stop_timeout_s: float, heartbeat: int) -> None:
    """Drain and exit once standard input ends. Its other end is held by the supervisor; by the
    gateways too if this is a worker, but no longer than they have to drain. A process that is
    stopped when the supervisor dies is continued.

    Args:
        heartbeat: the pipe that the supervisor reads, see `heartbeat.py`.
    """

    def watch_input() -> None:
        while os.read(stdin, 1024):
            pass
        end()

    def watch_supervisor() -> None:
        watched = select.poll()
        watched.register(heartbeat, 0)  # reports POLLERR once nobody can read it
        watched.poll()
        time.sleep(stop_timeout_s + GRACE_S)  # a gateway may hang, and never let go
        end()

    def end() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(stop_timeout_s + GRACE_S)
        os._exit(1)

    # A stopped process would do none of this.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    stdin = sys.stdin.fileno()
    for watch in (watch_input, watch_supervisor):
        threading.Thread(target=watch, name="parent", daemon=True).start()
