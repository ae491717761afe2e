"""A supervised process that loses its supervisor ends itself, however the supervisor died."""

import os
import signal
import sys
import threading
import time

LAST_SECONDS = 10


def end_with_parent(drain_timeout_s: float) -> None:
    """Watch standard input, whose other end the supervisor holds: at its end, drain and exit."""

    def watch() -> None:
        while os.read(stdin, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(drain_timeout_s + LAST_SECONDS)
        os._exit(1)

    stdin = sys.stdin.fileno()
    threading.Thread(target=watch, name="parent", daemon=True).start()
