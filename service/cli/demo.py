"""`vitrail demo`: the demo's catalog and its page, with one command."""

import contextlib
import socket
import webbrowser
from typing import Annotated

import typer

from service.cli.serve import serve_embedded
from service.cli.starting import read_settings, report_errors
from service.cli.summary import summarize_when_ready

TRIED_PORTS = 20


def demo(
    port: Annotated[int | None, typer.Option(help="REST port; by default a free one.")] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Serve the demo's models and open the page to try them."""
    rest = port if port is not None else _free_port(8000)
    settings = read_settings(
        {"catalog": "demo", "port": rest, "grpc_port": _free_port(rest + 1), "log_level": "warning"}
    )

    def open_page(url: str) -> None:
        if browser:
            webbrowser.open(url)  # False where there is no browser; the summary has the address

    summarize_when_ready(settings, open_page, always=True)
    with report_errors():
        serve_embedded(settings)


def _free_port(first: int) -> int:
    """The first free port on the loopback interface from `first` on."""
    for port in range(first, first + TRIED_PORTS):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    return first  # the server reports that it is taken
