"""Ports that must be free before a process starts anything."""

import socket


def check_free(host: str, port: int) -> None:
    """Raise OSError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()
