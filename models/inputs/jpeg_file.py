"""JPEG files that wait for their batch as they are, to be decoded together on its device.

Layout: ITU-T T.81, annex B.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from models.inputs.images import ImageLimits, decoding_errors, open_image
from models.inputs.jpeg import is_common_jpeg, transposition_of, upright_size
from models.inputs.jpeg_work import FRAMES, MAX_SEGMENTS, OTHER_FRAMES, SCAN

START, END = b"\xff\xd8", b"\xff\xd9"
BASELINE = 0xC0
APP1 = 0xE1  # EXIF and XMP
# Components of these names are red, green and blue where no marker says otherwise.
RGB = (82, 71, 66)


@dataclass(frozen=True, slots=True, eq=False)
class JpegFile:
    """A JPEG file whose header was checked.

    Args:
        data: the file.
        stored_size: (width, height) before it is turned.
        transposition: how its pixels become upright; None if they are.
        shape: of the input that it becomes, (3, height, width).
    """

    data: bytes
    stored_size: tuple[int, int]
    transposition: Image.Transpose | None
    shape: tuple[int, int, int]

    @property
    def size(self) -> tuple[int, int]:
        """The (width, height), upright."""
        return upright_size(self.stored_size, self.transposition)

    @property
    def pixels(self) -> int:
        return self.stored_size[0] * self.stored_size[1]


def open_jpeg(data: bytes, limits: ImageLimits, shape: tuple[int, int, int]) -> JpegFile | None:
    """A file of the kind that hardware decodes, with its header read and checked.

    That is baseline, in one scan, complete to its last marker, grey or YCbCr with common sampling.

    Returns:
        None for other files: the CPU decodes them, or says what is wrong with them.

    Raises:
        ImageTooLargeError, InputError: as `open_image`.
    """
    if not (data.startswith(START) and data.endswith(END)):
        return None
    header = open_image(data, limits)
    with decoding_errors(header):
        if not is_common_jpeg(header) or tuple(part[0] for part in header.layer) == RGB:
            return None
        if not _is_baseline(data):
            return None
        return JpegFile(data, header.size, transposition_of(header), shape)


def without_metadata(data: bytes) -> bytes:
    """The file without EXIF and XMP: a decoder would turn the pixels by it."""
    kept, position = [], 0
    for marker, start, end in _segments(data):
        if marker == APP1:
            kept.append(data[position:start])
            position = end
    return b"".join([*kept, data[position:]]) if kept else data


def _is_baseline(data: bytes) -> bool:
    frames: list[int] = []
    for marker, _, end in _segments(data):
        if marker == SCAN:
            # In the coded data 0xFF is followed by 0, so nothing else there looks like a scan.
            return frames == [BASELINE] and data.find(bytes((0xFF, SCAN)), end) < 0
        if marker in FRAMES or marker in OTHER_FRAMES:
            frames.append(marker)
    return False


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The marker, the start and the end of each segment up to the first scan's header."""
    position = len(START)
    for _ in range(MAX_SEGMENTS):
        head = data[position : position + 4]
        if len(head) < 4 or head[0] != 0xFF:
            return
        end = position + 2 + int.from_bytes(head[2:], "big")
        yield head[1], position, end
        if head[1] == SCAN:
            return
        position = end
