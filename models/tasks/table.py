"""The table of tasks: every module of this package that defines `TASK`, by the task's name."""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from models.discovery import modules_of
from models.errors import TaskError
from models.tasks.base import Task


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
