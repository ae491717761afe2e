"""Changes to a user's catalog file, which keep its comments and its formatting."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from models.catalog import BUILT_IN
from models.errors import CatalogError


def check_writable(path: Path) -> None:
    """Check that a catalog may be changed.

    Raises:
        CatalogError: it is built in, or its file cannot be written.
    """
    if path.parent == BUILT_IN:
        raise CatalogError(
            f"the catalog {path.stem} is built in; "
            f"copy it with `vitrail models copy {path.stem} FILE.toml` and use the copy"
        )
    if not os.access(path, os.W_OK):
        raise CatalogError(f"catalog {path}: the file cannot be written")


def update_trunk(path: Path, trunk: str, settings: Mapping[str, Any]) -> None:
    """Set keys of a trunk's table in a catalog file.

    Raises:
        CatalogError: as `check_writable`, or the file is not TOML.
    """
    check_writable(path)
    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8"))
        table: Any = document["trunks"]
        table = table[trunk]
        if "precision" in settings:
            table.pop("dtype", None)  # its other name
        for key, value in settings.items():
            table[key] = value
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_text(tomlkit.dumps(document), encoding="utf-8")
        temporary.chmod(path.stat().st_mode)
        temporary.replace(path)
    except (OSError, TOMLKitError) as error:
        raise CatalogError(f"catalog {path}: {error}") from error
