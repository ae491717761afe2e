"""What a caller or a training script says about a checkpoint, and what has to be assumed."""

import math
from collections.abc import Mapping
from typing import Any

from models.errors import CheckpointError

MIN_SIDE = 8  # pixels of an image


def whole(name: str, value: Any, least: int = 1) -> int:
    """An argument that is a whole number: a count or a length, and what else has a `least` value.

    Raises:
        CheckpointError: it is none, or less; 1.5 and True are not rounded.
    """
    found = number(name, value)
    if found != int(found) or found < least:
        raise CheckpointError(f"{name} is {value!r}; it must be a whole number, {least} or more")
    return int(found)


def wholes(name: str, values: Any, least: int = 1) -> list[int]:
    """An argument that is a list of whole numbers, each as `whole` reads it.

    Raises:
        CheckpointError: it is none.
    """
    if isinstance(values, list | tuple):
        return [whole(name, value, least) for value in values]
    raise CheckpointError(f"{name} is {values!r}; it must be a list of whole numbers")


def number(name: str, value: Any) -> float:
    """An argument that is a finite number.

    Raises:
        CheckpointError: it is none.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise CheckpointError(f"{name} is {value!r}; it must be a number")
    return found


def flag(name: str, value: Any) -> bool:
    """An argument that is true or false; 1 and 0 are that, too.

    Raises:
        CheckpointError: it is neither.
    """
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise CheckpointError(f"{name} is {value!r}; it must be true or false")


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
        """(height, width) of `img_size` in pixels, one side or both.

        Raises:
            CheckpointError: a side is no whole number, or smaller than any network's patches.
        """
        size = self.get("img_size", default, "image_size", "input_size")
        rows, columns = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        sides = whole("img_size", rows), whole("img_size", columns)
        if min(sides) < MIN_SIDE:
            raise CheckpointError(f"img_size is {size!r}; sides have at least {MIN_SIDE} pixels")
        return sides
