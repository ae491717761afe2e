"""Settings and error reports of the commands that start a process."""

import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from pydantic import ValidationError

from service.settings import Settings
from service.unknown_variables import unknown_variables


def read_settings(flags: Mapping[str, Any], *, warns: bool = True, serves: bool = True) -> Settings:
    """Read the settings from flags and the environment, and configure the log.

    Args:
        flags: values by setting; None for a flag that is not set.
        warns: log a warning for each variable that is not a setting. A supervisor has done so for
            its children.
        serves: whether the process is a server.

    Raises:
        typer.Exit: a setting is invalid.
    """
    from service.logs import configure_logs

    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        for variable, problem in setting_problems(error):
            typer.echo(f"vitrail: {variable}{': ' if variable else ''}{problem}", err=True)
        raise typer.Exit(2) from error
    configure_logs(settings.log_level)
    if warns:
        for problem in unknown_variables(settings, os.environ, serves=serves):
            logging.getLogger("service").warning(problem)
    return settings


def setting_problems(error: ValidationError) -> Iterator[tuple[str, str]]:
    """The variable of each wrong setting and what is wrong with it; no variable where several
    settings do not fit together."""
    for item in error.errors():
        name = str(item["loc"][0]).upper().removeprefix("VITRAIL_") if item["loc"] else ""
        yield f"VITRAIL_{name}" if name else "", item["msg"].removeprefix("Value error, ")


def check_port(host: str, port: int, flag: str) -> None:
    """Check that nothing else listens on a port, before models are loaded.

    Args:
        flag: the option that chooses another one.

    Raises:
        OSError: something does, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise OSError(
            f"{host}:{port}: {error.strerror}; stop what listens there (`ss -ltnp`), or choose "
            f"another one with {flag}"
        ) from error


@contextmanager
def report_errors() -> Iterator[None]:
    """Report errors that the user can fix, in one line each, and exit with status 2."""
    from models.errors import ModelsError
    from service.tracing import TracingError

    try:
        yield
    except (ModelsError, OSError, TracingError) as error:
        typer.echo(f"vitrail: {error}", err=True)
        sys.exit(2)
