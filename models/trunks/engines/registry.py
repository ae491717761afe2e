"""Engines by name."""

from collections.abc import Mapping

from models.discovery import classes_of
from models.errors import CatalogError
from models.trunks.engines.base import Engine


def engine_classes() -> Mapping[str, type[Engine]]:
    """Every engine by its `name`."""
    return classes_of("models.trunks.engines", "name")


def engine_class(name: str) -> type[Engine]:
    """The engine of that name.

    Raises:
        CatalogError: no such engine.
    """
    engines = engine_classes()
    if name not in engines:
        raise CatalogError(f"unknown engine {name!r}; engines: {', '.join(engines)}")
    return engines[name]
