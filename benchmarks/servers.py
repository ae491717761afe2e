"""Starts servers to measure, as a user would start them."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from benchmarks.processes import Usage, marked_processes, usage

MARK = "BENCHMARK_SERVER"
START_S = 180
STOP_S = 20


class StartError(Exception):
    """A process ended, or was not ready in time."""


class Server:
    """A context manager that runs a server on a port of this machine until it is left.

    Args:
        ready: the path that answers 200 once the server can be used.
        environment: variables in addition to this process's.
        folder: the working folder; None for this process's.
        log: a file for its output; None for this process's output.
        authority: the CA of its certificate, if it speaks TLS.

    Attributes:
        mark: the value of the variable `MARK` in the environments of all its processes.
    """

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        *,
        ready: str = "/readyz",
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        log: Path | None = None,
        authority: Path | None = None,
    ) -> None:
        self.port = port
        self._command = command
        scheme = "http" if authority is None else "https"
        self._ready = f"{scheme}://127.0.0.1:{port}{ready}"
        self._verify = ssl.create_default_context(cafile=authority)
        self.mark = uuid.uuid4().hex
        self._environment = {**os.environ, **(environment or {}), MARK: self.mark}
        self._folder = folder
        self._log = log

    def __enter__(self) -> "Server":
        """
        Raises:
            StartError: the server ended, or was not ready in time.
        """
        with _opened(self._log) as output:
            self._process = subprocess.Popen(
                self._command, env=self._environment, cwd=self._folder, stdout=output,
                stderr=subprocess.STDOUT if output else None,
            )  # fmt: skip
        try:
            self._wait_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def usage(self) -> Usage:
        """The processor time and memory of all of the server's processes."""
        return usage(self._processes())

    def _wait_ready(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            try:
                if httpx.get(self._ready, verify=self._verify).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if (status := self._process.poll()) is not None:
                raise StartError(f"the server ended with status {status}; log: {self._log}")
            time.sleep(0.2)
        raise StartError(f"the server was not ready after {START_S} s; log: {self._log}")

    def _processes(self) -> list[int]:
        return marked_processes(MARK, self.mark)

    def _stop(self) -> None:
        """End the server, and what it leaves behind."""
        self._process.send_signal(signal.SIGTERM)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._wait_stopped():
                return
            for pid in self._processes():
                _signal(pid, number)
        self._wait_stopped()

    def _wait_stopped(self) -> bool:
        end = time.monotonic() + STOP_S
        while time.monotonic() < end:
            self._process.poll()  # a zombie keeps its environment otherwise
            if not self._processes():
                return True
            time.sleep(0.1)
        return False


def demo_server(
    port: int,
    model: str,
    *flags: str,
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Server:
    """`vitrail serve` with models of the demo catalog, by their names with commas between."""
    command = [
        sys.executable, "-m", "service.cli", "serve", "--port", str(port),
        "--grpc-port", str(free_port()), "--models", model, "--log-level", "warning", *flags,
    ]  # fmt: skip
    return Server(command, port, environment=environment, log=log)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def _opened(log: Path | None) -> Iterator[int | None]:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        yield file.fileno()


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
