"""What a caller or a training script says about a checkpoint, and what has to be assumed."""

from collections.abc import Mapping
from typing import Any

from models.errors import CheckpointError


class Known:
    """Values by name, from the caller's arguments, else from the training script's.

    Attributes:
        assumed: the defaults that were used since neither has them, for `Checkpoint.assumed`.
    """

    def __init__(
        self, arguments: Mapping[str, Any], script: Mapping[str, Any] | None = None
    ) -> None:
        self._sources = (arguments, script or {})
        self.assumed: dict[str, Any] = {}

    def find(self, name: str, *others: str) -> Any:
        """The value under the first of the names that has one; None if none has."""
        for source in self._sources:
            for key in (name, *others):
                if source.get(key) is not None:
                    return source[key]
        return None

    def get(self, name: str, default: Any, *others: str) -> Any:
        """As `find`, or else the default, which is then assumed under `name`."""
        value = self.find(name, *others)
        if value is None:
            self.assumed[name] = value = default
        return value

    def require(self, name: str, plausible: str, *others: str) -> Any:
        """As `find`.

        Raises:
            CheckpointError: no value; it names the argument and what is plausible.
        """
        value = self.find(name, *others)
        if value is None:
            raise CheckpointError(
                f"the file does not say {name}, and its shapes do not determine it; set "
                f"arguments = {{{name} = ...}}: {plausible}"
            )
        return value

    def image_size(self, default: int = 224) -> tuple[int, int]:
        """(height, width) of `img_size` in pixels, one side or both."""
        size = self.get("img_size", default, "image_size", "input_size")
        rows, columns = (size, size) if isinstance(size, int) else size
        return int(rows), int(columns)
