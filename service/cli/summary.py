"""The summary that a person sees once a server is ready, in place of log lines."""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from models.catalog_content import without_secrets
from service.settings import Settings

POLL_S = 0.3
# What waits for its turn; what is shown, each once, is what is done for it: "model X is loading".
WAITING = (" is unloaded", " has not been read yet")
# From this width on a model's line has room for how it runs.
ENGINE_WIDTH = 72

console = Console(stderr=True, highlight=False)


def local_url(settings: Settings) -> str:
    """The server's URL on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    scheme = "https" if settings.tls_cert else "http"
    address = f"[{host}]" if ":" in host else host
    return f"{scheme}://{address}:{settings.port}"


def summarize_when_ready(
    settings: Settings, then: Callable[[str], None] | None = None, *, always: bool = False
) -> None:
    """If a person looks, print the summary as soon as the server is ready; returns at once.

    It asks the server over HTTP, so it is the same for one process and for several.

    Args:
        then: called with the server's URL after that.
        always: also where standard error is not a terminal.
    """
    if settings.port and (always or sys.stderr.isatty()):
        url = local_url(settings)
        watch = threading.Thread(target=_watch, args=(url, settings, then), daemon=True)
        watch.start()


def _watch(url: str, settings: Settings, then: Callable[[str], None] | None) -> None:
    keys = (*settings.admin_keys, *settings.api_keys)
    headers = {"X-API-Key": keys[0].get_secret_value()} if keys else {}
    catalog = without_secrets(settings.catalog)
    console.print(f"Vitrail starts on [bold]{url}[/bold] and loads the catalog {catalog}")
    if settings.tls_cert:  # its certificate is for another name than this machine's loopback
        console.print(summary(url, settings, []))
        return
    shown: list[str] = []
    with httpx.Client(base_url=url, headers=headers, timeout=5, trust_env=False) as client:
        while True:
            time.sleep(POLL_S)
            try:
                answer = client.get("/readyz")
                reasons: list[str] = answer.json()["reasons"]
            except (httpx.HTTPError, ValueError, KeyError):
                continue  # it does not listen yet
            if answer.status_code == 200:
                break
            for reason in reasons:
                if reason not in shown and not reason.endswith(WAITING):
                    shown.append(reason)
                    console.print(f"  {reason}")
        try:
            models = client.get("/models").json()["models"]
        except (httpx.HTTPError, ValueError, KeyError):
            models = []
    console.print(summary(url, settings, models))
    if then is not None:
        then(url)


def _program() -> str:
    """How a person calls this program: by its path if it is not on PATH, as after `make serve`."""
    called = sys.argv[0]
    return called if called.endswith("/vitrail") and not shutil.which("vitrail") else "vitrail"


def summary(url: str, settings: Settings, models: list[dict[str, Any]]) -> Table:
    """Where the server is, what it serves, and how to try it."""
    ready = [model for model in models if model["state"] == "ready"]
    engines = Table(box=None, pad_edge=False, show_header=False)
    columns = ("engine", "precision", "device") if console.width >= ENGINE_WIDTH else ()
    for model in ready:
        default = "*" if model["task"] in model["default_for"] else ""
        parts = [str(model.get(name, "")) for name in columns]
        engines.add_row(model["name"], model["task"] + default, *parts)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("page", url)
    table.add_row("API", f"{url}/docs, gRPC on port {settings.grpc_port}")
    if ready:
        table.add_row("models", engines)
    elif models:
        table.add_row("models", f"{len(models)} in the catalog; the first request loads one")
    address = "" if url == "http://127.0.0.1:8000" else f" --url {url}"
    table.add_row("try", f"{_program()} classify photo.jpg{address}")
    table.add_row("", f"curl -F image=@photo.jpg {url}/classify")
    table.add_row("stop", "Ctrl-C")
    return table
