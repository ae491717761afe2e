"""Numbers of attention heads, which no shape determines: stated, or published for a width."""

from collections.abc import Mapping
from typing import Any

from models.checkpoints.families.known import whole
from models.errors import CheckpointError

# Heads by channels, of all published ViTs of that width (T, S, B, L and H).
VIT = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
# Of CLIP's text transformers.
TEXT = {512: 8, 640: 10, 768: 12, 1024: 16}
CHANNELS = range(8, 129)  # what a head plausibly has


def head_count(
    width: int,
    arguments: Mapping[str, Any],
    *,
    name: str = "num_heads",
    published: Mapping[int, int] = VIT,
) -> int:
    """The number of heads: `arguments[name]`, or that of all published networks of the width.

    Raises:
        CheckpointError: neither is known, or it does not divide the width.
    """
    stated = arguments.get(name)
    if stated is None and width in published:
        return published[width]
    if stated is None:
        counts = [count for count in range(1, width + 1) if width % count == 0]
        plausible = ", ".join(str(count) for count in counts if width // count in CHANNELS)
        raise CheckpointError(
            f"no published network has {width} channels, and their number of heads is not in the "
            f"weights; set {name}: one of {plausible}"
        )
    heads = whole(name, stated)
    if heads < 1 or width % heads:
        raise CheckpointError(
            f"{name} is {heads}, which does not divide {width} channels; set a divisor of them"
        )
    return heads


def assumed(arguments: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Those of the values that the arguments do not state."""
    return {name: value for name, value in values.items() if name not in arguments}
