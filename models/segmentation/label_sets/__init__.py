"""Class names and colours of well-known segmentation data sets.

ADE20K's 150, Cityscapes' 19 and Pascal VOC's 21, in the order and the colours that mmsegmentation
publishes (Apache-2.0).
"""

import json
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent

Palette = Sequence[Sequence[int]]


def label_sets() -> list[str]:
    """The names of all sets."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_label_set(name: str) -> tuple[tuple[str, ...], Palette]:
    """The class names of a set, and their colours as (red, green, blue), 0 to 255.

    Raises:
        KeyError: no set has that name.
    """
    if name not in label_sets():
        raise KeyError(name)
    content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return tuple(content["labels"]), content["palette"]


def palette_of(labels: Sequence[str]) -> Palette:
    """The colours of the set with exactly these labels; Pascal VOC's colour map for any others."""
    for name in label_sets():
        names, palette = load_label_set(name)
        if tuple(labels) == names:
            return palette
    return [_colour(number + 1) for number in range(len(labels))]


def _colour(number: int) -> list[int]:
    """Pascal VOC's colour map: the number's bits, spread over the three channels, highest first."""
    colour = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            colour[channel] |= (number >> channel & 1) << (7 - place)
        number >>= 3
    return colour
