"""Pictures in the terminal: as its own graphics where it has them, else as coloured half blocks.

The graphics are [kitty's](https://sw.kovidgoyal.net/kitty/graphics-protocol/) and
[iTerm2's](https://iterm2.com/documentation-images.html). Terminals are known by their environment
and not asked, since an answer that never comes would have to be waited for.
"""

import base64
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import ControlType, Segment
from rich.style import Style

from models.errors import ModelsError
from models.inputs.images import DEFAULT_LIMITS, decode_reduced

COLUMNS, ROWS = 48, 24  # at most
CELL = 16  # pixels of a column in the terminal's own graphics
CHUNK = 4096  # characters of one of kitty's sequences
PNG_BASE64 = base64.b64encode(b"\x89PNG\r\n\x1a\n")[:8].decode()

KITTY, ITERM2 = "kitty", "iTerm2"
BY_TERM = {"xterm-kitty": KITTY, "xterm-ghostty": KITTY}
BY_PROGRAM = {"ghostty": KITTY, "iTerm.app": ITERM2, "WezTerm": ITERM2, "mintty": ITERM2}


def graphics(environment: Mapping[str, str]) -> str | None:
    """The protocol that the terminal has; None within a multiplexer, which shows text alone."""
    if "TMUX" in environment or "STY" in environment:
        return None
    known = BY_TERM.get(environment.get("TERM", ""))
    return known or BY_PROGRAM.get(environment.get("TERM_PROGRAM", ""))


class Picture:
    """What rich prints an RGB image by, up to some columns and ROWS of the terminal."""

    def __init__(self, image: Image.Image, columns: int = COLUMNS) -> None:
        self._image = image
        self._columns = columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = self._image.size
        # a cell is twice as high as it is wide
        columns = min(self._columns, options.max_width, 2 * ROWS * width // height) or 1
        rows = max(1, round(columns * height / width / 2))
        protocol = graphics(os.environ)
        if protocol is None:
            yield from _half_blocks(self._image.resize((columns, 2 * rows)))
            return
        written = io.BytesIO()
        self._image.resize((CELL * columns, 2 * CELL * rows)).save(written, "PNG")
        encoded = base64.b64encode(written.getvalue()).decode()
        sequence = _kitty if protocol == KITTY else _iterm2
        control = [(ControlType.CARRIAGE_RETURN,)]  # no text that would be measured
        yield Segment(sequence(encoded, columns, rows), control=control)
        yield Segment.line()


def _half_blocks(image: Image.Image) -> Iterator[Segment]:
    """Two pixels a cell, the upper one as the colour of the text."""
    pixels: Any = image.load()
    for y in range(0, image.height, 2):
        for x in range(image.width):
            upper, lower = Color.from_rgb(*pixels[x, y]), Color.from_rgb(*pixels[x, y + 1])
            yield Segment("▀", Style(color=upper, bgcolor=lower))
        yield Segment.line()


def _kitty(encoded: str, columns: int, rows: int) -> str:
    chunks = [encoded[start : start + CHUNK] for start in range(0, len(encoded), CHUNK)]
    keys = f"a=T,f=100,q=2,c={columns},r={rows},"
    parts = []
    for place, chunk in enumerate(chunks):
        parts.append(f"\x1b_G{keys}m={int(place + 1 < len(chunks))};{chunk}\x1b\\")
        keys = ""
    return "".join(parts)


def _iterm2(encoded: str, columns: int, rows: int) -> str:
    return f"\x1b]1337;File=inline=1;width={columns};height={rows}:{encoded}\a"


def picture_of(path: Path, entry: Mapping[str, Any]) -> Image.Image | None:
    """An answer's own pictures side by side, or else the image that it is about, as RGB; None if
    that cannot be read.

    Args:
        entry: one entry of `results`. Pictures are its members that are base64 of a PNG.
    """
    drawn = [
        Image.open(io.BytesIO(base64.b64decode(value)))
        for value in entry.values()
        if isinstance(value, str) and value.startswith(PNG_BASE64)
    ]
    if drawn:
        return _side_by_side([_to_rgb(image) for image in drawn])
    try:
        return read_picture(path.read_bytes())
    except OSError:
        return None


def read_picture(encoded: bytes) -> Image.Image | None:
    """An encoded image, upright and in RGB; None if it cannot be decoded."""
    try:
        return decode_reduced(encoded, DEFAULT_LIMITS, CELL * COLUMNS).image
    except ModelsError:
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    return image.convert("RGB")


def _side_by_side(images: list[Image.Image]) -> Image.Image:
    """Images of one height."""
    joined = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        joined.paste(image, (left, 0))
        left += image.width
    return joined
