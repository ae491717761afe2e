"""tritonclient's utilities for shared memory, which import setuptools' pkg_resources for one
function."""

import sys
from importlib.resources import files
from types import ModuleType
from typing import Any


def load() -> Any:
    """The module `tritonclient.utils.shared_memory`."""
    stand_in = ModuleType("pkg_resources")
    stand_in.resource_filename = lambda package, name: str(files(package) / name)  # type: ignore[attr-defined]
    sys.modules.setdefault("pkg_resources", stand_in)
    from tritonclient.utils import shared_memory

    return shared_memory
