"""Starts servers to measure, as a user would start them."""

import signal
import socket
import subprocess
import sys
import time

import httpx


class Server:
    """A context manager that runs `vitrail serve` with one model of the demo catalog."""

    def __init__(self, port: int, model: str, *flags: str) -> None:
        self._port = port
        command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port)]
        command += ["--grpc-port", str(free_port()), "--models", model]
        self._command = [*command, "--log-level", "warning", *flags]

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._command)
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{self._port}/readyz").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise SystemExit("the server did not become ready")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
