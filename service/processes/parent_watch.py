"""Ends a supervised process when its supervisor dies, even by SIGKILL."""

import os
import signal
import sys
import threading
import time

# Seconds beyond the time to drain after which the process is ended by force.
GRACE_S = 10


def end_with_parent(stop_timeout_s: float) -> None:
    """Drain and exit once standard input ends. Its other end is held by the supervisor; by the
    gateways too if this is a worker."""

    def watch() -> None:
        while os.read(stdin, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(stop_timeout_s + GRACE_S)
        os._exit(1)

    stdin = sys.stdin.fileno()
    threading.Thread(target=watch, name="parent", daemon=True).start()
