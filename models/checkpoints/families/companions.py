"""Files that belong to a checkpoint: named in its arguments, or found beside it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.checkpoints.containers import Container, open_container
from models.errors import CheckpointError


def open_companion(
    container: Container, arguments: Mapping[str, Any], name: str, files: Sequence[str]
) -> Container:
    """The companion at `arguments[name]` (a path as it is, or relative to the checkpoint), or the
    first of `files` that lies beside it.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    folder = container.path.parent
    if name in arguments:
        given = Path(arguments[name])
        return open_container(given if given.is_file() else folder / given)
    for file in files:
        if (folder / file).is_file():
            return open_container(folder / file)
    raise CheckpointError(
        f"{container.path} needs its {name}: put {' or '.join(files)} beside it, or say where it "
        f"is: arguments = {{{name} = 'FILE'}}"
    )
