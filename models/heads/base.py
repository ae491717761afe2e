"""What most heads do the same way; a head overrides what it does otherwise."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.inputs.tiling import View
from models.trunks.features import NOTHING, Need


class BaseHead:
    forward_options: frozenset[str] = frozenset()
    finish_is_slow = False
    network: Any = None
    view: View | None = None

    def needs(self, rows: Sequence[int]) -> Need:
        return NOTHING

    def check(self, options: Mapping[str, Any]) -> None:
        pass

    def at_size(self, options: Mapping[str, Any], size: tuple[int, int]) -> Mapping[str, Any]:
        return options

    def sees_image(self, options: Mapping[str, Any]) -> bool:
        return False
