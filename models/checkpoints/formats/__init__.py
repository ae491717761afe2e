"""Checkpoint formats: one file per published layout, found by looking into this package.

A format is a module with `NAME`, `matches(container, arguments) -> str | None` (why it is this
format, or None) and `convert(container, arguments) -> Checkpoint`. Where the authors have more
outputs than trunk and heads, also `outputs(model, output, inputs) -> dict[str, Tensor]`, and if
these want more of a pass than its last output, `request(trunk) -> FeatureRequest`.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol, cast

from models.checkpoints.checkpoint import Checkpoint
from models.checkpoints.containers import Container
from models.errors import CheckpointError
from models.trunks.base import Trunk
from models.trunks.features import NO_EXTRAS, FeatureRequest


class CheckpointFormat(Protocol):
    """The shape of every module in this package."""

    NAME: str

    def matches(self, container: Container, arguments: Mapping[str, Any]) -> str | None:
        """Why the container is of this format, or None where it is not."""

    def convert(self, container: Container, arguments: Mapping[str, Any]) -> Checkpoint:
        """Translate to an architecture's own names; the container is left as it is."""


@cache
def checkpoint_formats() -> tuple[CheckpointFormat, ...]:
    """Every format of this package, in the order of their file names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(cast("CheckpointFormat", module) for module in modules)


def format_outputs(name: str, trunk: Trunk) -> tuple[Any, FeatureRequest]:
    """The `outputs` of the format of that name, None if it has none, and their need."""
    found = next((module for module in checkpoint_formats() if name == module.NAME), None)
    need = getattr(found, "request", None)
    return getattr(found, "outputs", None), need(trunk) if need else NO_EXTRAS


def detect_format(
    container: Container, arguments: Mapping[str, Any]
) -> tuple[CheckpointFormat, str]:
    """The one format that matches, and why.

    Raises:
        CheckpointError: none or several match.
    """
    found = [
        (candidate, reason)
        for candidate in checkpoint_formats()
        if (reason := candidate.matches(container, arguments))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(candidate.NAME for candidate, _ in found)
        raise CheckpointError(f"{container.path}: several formats match: {names}")
    known = ", ".join(candidate.NAME for candidate in checkpoint_formats())
    keys = ", ".join(list(container.tensors)[:5])
    raise CheckpointError(
        f"{container.path}: no known format (known: {known}). Its keys begin with {keys}. If it "
        "is a timm state dict, say which: architecture = '...' in the catalog, or --architecture."
    )
