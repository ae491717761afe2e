"""What the commands that start a process share."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from pydantic import ValidationError

from service.settings import Settings


def read_settings(flags: Mapping[str, Any]) -> Settings:
    """The settings from flags and environment, with the log set up; a wrong one ends the command.

    A flag that is None was not given.
    """
    from service.logs import configure_logs

    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        for item in error.errors():
            typer.echo(f"{'.'.join(map(str, item['loc']))}: {item['msg']}", err=True)
        raise typer.Exit(2) from error
    configure_logs(settings.log_level)
    return settings


@contextmanager
def told_plainly() -> Iterator[None]:
    """End the command with 2 and one line for what its user can put right."""
    from models.errors import ModelsError

    try:
        yield
    except (ModelsError, OSError) as error:
        typer.echo(f"vitrail: {error}", err=True)
        sys.exit(2)
