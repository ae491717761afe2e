"""The table of tasks: every module of this package that defines `TASK`, by the task's name."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from models.discovery import modules_of
from models.errors import InputError, TaskError
from models.tasks.base import Options, Task


@cache
def tasks() -> Mapping[str, Task]:
    """Every task by name, in the order of the modules' names.

    Raises:
        ValueError: two modules define the same task.
    """
    table: dict[str, Task] = {}
    for module in modules_of("models.tasks"):
        task = getattr(module, "TASK", None)
        if isinstance(task, Task):
            if task.name in table:
                raise ValueError(f"{module.__name__}: the task {task.name!r} is defined twice")
            table[task.name] = task
    return MappingProxyType(table)


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        TaskError: no such task.
    """
    if name not in tasks():
        raise TaskError(f"no task {name!r}; tasks: {', '.join(tasks())}", field="task")
    return tasks()[name]


def parse_options(task: str, options: Mapping[str, Any]) -> Options:
    """A task's options, validated.

    Raises:
        InputError: an unknown option, or a wrong value.
    """
    try:
        return get_task(task).options.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"{field}: {first['msg']}", field=field or None) from error
