"""Companion files of a checkpoint: named in its arguments, or in the same folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.checkpoints.containers import Container, open_container
from models.errors import CheckpointError


def open_companion(
    container: Container, arguments: Mapping[str, Any], name: str, files: Sequence[str]
) -> Container:
    """Open the companion at `arguments[name]`, or the first of `files` in the checkpoint's folder.

    Args:
        arguments: a path under `name` is used as it is, or relative to the checkpoint.
        name: what the companion is, such as `backbone`.
        files: default file names.

    Raises:
        CheckpointError: no such file, or it cannot be read.
    """
    folder = container.path.parent
    if name in arguments:
        path = Path(arguments[name])
        return open_container(path if path.is_file() else folder / path)
    for file in files:
        if (folder / file).is_file():
            return open_container(folder / file)
    raise CheckpointError(
        f"{container.path} needs its {name}: put {' or '.join(files)} beside it, or set its path: "
        f"arguments = {{{name} = 'FILE'}}"
    )


def pca_path(container: Container, arguments: Mapping[str, Any]) -> Path:
    """Where a PCA of a descriptor is: at `arguments["pca"]`, or `pca.npz` beside the checkpoint."""
    return Path(arguments["pca"]) if "pca" in arguments else container.path.with_name("pca.npz")
