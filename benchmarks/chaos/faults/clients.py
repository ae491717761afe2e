"""What clients do: administrators who reload models, and others who never read."""

import socket
import time
from contextlib import ExitStack

from benchmarks.chaos.faults.fault import FAULT_S
from benchmarks.chaos.target import BODY_TIMEOUT_S, Target

SILENT_CLIENTS = 20


def models_reloaded(target: Target) -> None:
    """A model on the trunk that others use is unloaded and loaded."""
    for _ in range(4):
        for action in ("unload", "load"):
            assert target.ask("POST", f"/models/{target.embedding}/{action}") == 200
    target.wait_whole()


def clients_never_read(target: Target) -> None:
    """They send requests with large answers without end."""
    asking = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400
    with ExitStack() as stack:
        clients = []
        for _ in range(SILENT_CLIENTS):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", target.port)))
            client.sendall(asking)
            clients.append(client)
        time.sleep(BODY_TIMEOUT_S + FAULT_S)
        for client in clients:
            _assert_cut(client)


def _assert_cut(client: socket.socket) -> None:
    client.settimeout(10)
    try:
        while client.send(b"\r\n"):
            time.sleep(0.01)
    except ConnectionError:
        return
    except TimeoutError as error:
        raise AssertionError("a client that never reads is not cut") from error
