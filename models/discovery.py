"""Finding extensions: classes and modules that are in a package are in use."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any


def modules_of(package: str) -> Iterator[ModuleType]:
    """Every module of a package, imported, in the order of their names."""
    path = importlib.import_module(package).__path__
    for info in sorted(pkgutil.iter_modules(path), key=lambda info: info.name):
        yield importlib.import_module(f"{package}.{info.name}")


@cache
def classes_of(package: str, attribute: str) -> Mapping[str, type[Any]]:
    """The classes that modules of a package define, by a class attribute that names them.

    Raises:
        ValueError: two classes have the same name.
    """
    classes: dict[str, type[Any]] = {}
    for module in modules_of(package):
        for value in vars(module).values():
            if not inspect.isclass(value) or value.__module__ != module.__name__:
                continue
            name = value.__dict__.get(attribute)
            if not isinstance(name, str):
                continue
            if name in classes:
                raise ValueError(f"{module.__name__}: {attribute} {name!r} is defined twice")
            classes[name] = value
    return MappingProxyType(classes)
