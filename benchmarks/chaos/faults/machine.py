"""Faults of the machine: its ports and its clock."""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.chaos.clients import Clients
from benchmarks.chaos.faults.fault import FAULT_S, SkippedError
from benchmarks.chaos.target import LOG, Target
from benchmarks.servers import demo_server, free_port


def port_taken(target: Target) -> None:
    """Another server on the same port, or with the same port for gRPC, ends with an error."""
    for port, grpc_port in ((target.port, free_port()), (free_port(), target.grpc_port)):
        command = [sys.executable, "-m", "service.cli", "serve", "--workers", "1"]
        command += ["--port", str(port), "--grpc-port", str(grpc_port)]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as other:
            try:
                assert other.wait(60) != 0
            except subprocess.TimeoutExpired:
                other.terminate()
                raise AssertionError(f"a second server runs on {port}, {grpc_port}") from None


def clock_jumps(target: Target) -> None:
    """A day forward and back, on a server of its own: the library that changes its clock is loaded
    when it starts."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        raise SkippedError("libfaketime is not installed")
    clock = target.catalog.with_name("clock")
    clock.write_text("+0")
    environment = {
        **target.environment,
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # which does not jump
        "FAKETIME_DISABLE_SHM": "1",
    }
    flags = ["--workers", "1", "--catalog", str(target.catalog)]
    port = free_port()
    with demo_server(port, target.model, *flags, environment=environment, log=LOG):
        clients = Clients(port, target.model)
        with clients.running():
            for offset in ("+0", "+100000", "-100000", "+0"):
                clock.write_text(offset)
                time.sleep(FAULT_S)
    assert clients.counts.answered, "nothing was answered"
    assert not clients.counts.lost, clients.counts.lost
