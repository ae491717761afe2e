"""Builds a command from each task of the table: `vitrail classify PATH...` and all others."""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from models.tasks.base import Task
from service.cli.client import (
    DEFAULT_CONCURRENCY,
    Client,
    Concurrency,
    Json,
    Key,
    Model,
    Paths,
    Show,
    Url,
)
from vitrail_client.protocol import DEFAULT_URL

# `--output` is the file to write, so the option that chooses a task's form has another flag.
FLAGS = {"output": "form"}

C = TypeVar("C", bound=Client)


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """The arguments of a task's command; `options` are the task's own, None if not given."""

    paths: list[Path]
    url: str
    key: str | None
    model: str | None
    as_json: bool
    output: Path | None
    show: bool
    concurrency: int
    options: Mapping[str, Any]

    def client(self, task: Task, kind: type[C]) -> C:
        """A client of that class for the task's route."""
        parameters = {"model": self.model, **self.options}
        printed = self.output is None and not self.as_json
        if self.show and printed and "overlay" in task.forms:
            parameters["output"] = parameters["output"] or "overlay"
        return kind(self.url, self.key, task.name, parameters, self.concurrency)


# `run(task, invocation, **flags)`: what a command does; `flags` are those of this command only.
Run = Callable[..., None]


def run_task(task: Task, invocation: Invocation) -> None:
    """Print a line for each image, or write a table."""
    with invocation.client(task, Client) as client:
        client.run(
            invocation.paths, invocation.as_json, invocation.output, task.line, show=invocation.show
        )


def task_command(
    task: Task,
    run: Run = run_task,
    output_help: str = "Write a .parquet file.",
    flags: Sequence[inspect.Parameter] = (),
) -> Callable[..., None]:
    """The command of a task, as a function from whose signature typer builds the command line.

    Args:
        run: what the command does.
        output_help: the help text of `--output`.
        flags: further flags of this command, for `run`.
    """
    fields = _option_fields(task)

    def command(**arguments: Any) -> None:
        options = {name: arguments.pop(FLAGS.get(name, name)) for name in fields}
        further = {flag.name: arguments.pop(flag.name) for flag in flags}
        run(task, Invocation(**arguments, options=options), **further)

    command.__doc__ = task.summary
    parameters = [
        flag_parameter("paths", Paths),
        flag_parameter("url", Url, DEFAULT_URL),
        flag_parameter("key", Key, None),
        flag_parameter("model", Model, None),
        *(_option_parameter(FLAGS.get(name, name), field) for name, field in fields.items()),
        flag_parameter("as_json", Json, False),
        flag_parameter("output", Annotated[Path | None, typer.Option(help=output_help)], None),
        *flags,
        flag_parameter("show", Show, False),
        flag_parameter("concurrency", Concurrency, DEFAULT_CONCURRENCY),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # PEP 362
    return command


def flag_parameter(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    """A parameter of a command, as typer reads it from a signature."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _option_fields(task: Task) -> dict[str, FieldInfo]:
    """The options that become flags: not those that are inputs, nor those that only render JSON."""
    hidden = task.options.input_fields | task.options.render_fields
    return {n: field for n, field in task.options.model_fields.items() if n not in hidden}


def _option_parameter(flag: str, field: FieldInfo) -> inspect.Parameter:
    """An option's flag. Without a value it is not sent, so the server's default applies."""
    low, high = _bounds(field)
    option = typer.Option(
        help=field.description,
        min=low,
        max=high,
        show_default=False if field.default is None else str(field.default).lower(),
    )
    if field.is_required():
        return flag_parameter(flag, Annotated[_flag_type(field), option])
    return flag_parameter(flag, Annotated[_flag_type(field) | None, option], None)


def _flag_type(field: FieldInfo) -> Any:
    """The option's type without None; text for types that a command line does not have."""
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        annotation = kinds[0] if len(kinds) == 1 else str
    if get_origin(annotation) is Literal:
        return annotation
    return annotation if annotation in (bool, int, float, str, list[str]) else str


def _bounds(field: FieldInfo) -> tuple[float | None, float | None]:
    """A number's smallest and largest value.

    Typer has no exclusive bounds; for floats the server refuses the bound itself.
    """
    kind = _flag_type(field)
    if kind not in (int, float):
        return None, None
    step = 1 if kind is int else 0
    low = high = None
    for item in field.metadata:
        low = getattr(item, "ge", low)
        high = getattr(item, "le", high)
        if (above := getattr(item, "gt", None)) is not None:
            low = above + step
        if (below := getattr(item, "lt", None)) is not None:
            high = below - step
    return low, high
