"""JPEG files that wait for their batch as they are, to be decoded together on its device.

A decoder of a device may leave pixels that no code describes as they were in its memory, and a file
that it refuses costs more than the other files of its batch. So files are checked here for all that
can be seen without decoding them, and those in doubt are left to the CPU.

Layout: ITU-T T.81, annex B.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from models.inputs.images import ImageLimits, decoding_errors, open_image
from models.inputs.jpeg import is_common_jpeg, transposition_of, upright_size
from models.inputs.jpeg_work import MAX_SEGMENTS, SCAN

START, END = b"\xff\xd8", b"\xff\xd9"
BASELINE, HUFFMAN, QUANTISATION, RESTART_INTERVAL = 0xC0, 0xC4, 0xDB, 0xDD
APP1 = 0xE1  # EXIF and XMP
# Segments of applications, and comments.
NOTES = {*range(0xE0, 0xF0), 0xFE}
# A marker in coded data that is neither a stuffed 0xFF nor a restart.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")
# Pixels in each direction of a block, and the least bits that code one: one for the difference of
# its mean, and one for the end of the block.
BLOCK, BLOCK_BITS = 8, 2
# A table's class and number, and how many codes of 1 to 16 bits it has.
HUFFMAN_HEAD = 17
QUANTISATION_BYTES = 65
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

    That is baseline, in one scan, complete to its last marker, grey or YCbCr with common sampling,
    with well-formed tables and no fewer coded bytes than its size needs.

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
        coded = _coded_bytes(data, header.layers)
        if coded is None or coded * 8 < _blocks(header) * BLOCK_BITS:
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


def _coded_bytes(data: bytes, components: int) -> int | None:
    """The bytes of the one scan, of all components, of a baseline file; None for other files."""
    frames, tables, quantisation = 0, set[int](), False
    for marker, start, end in _segments(data):
        content = data[start + 4 : end]
        if marker == SCAN:
            # Tables 0 of both classes, for means and for the rest.
            is_whole = frames == 1 and quantisation and {0x00, 0x10} <= tables
            coded_end = len(data) - len(END)
            last = MARKER.search(data, end)
            if not is_whole or content[:1] != bytes((components,)):
                return None
            return coded_end - end if last is not None and last.start() == coded_end else None
        if marker == BASELINE:
            frames += 1
        elif marker == HUFFMAN:
            if (found := _huffman_tables(content)) is None:
                return None
            tables |= found
        elif marker == QUANTISATION:
            quantisation = True
            numbers = content[::QUANTISATION_BYTES]  # above 3 for tables of 16 bits
            if not content or len(content) % QUANTISATION_BYTES or max(numbers) > 3:
                return None
        elif marker != RESTART_INTERVAL and marker not in NOTES:
            return None
    return None


def _huffman_tables(content: bytes) -> set[int] | None:
    """The class and number of each table of a segment; None if one is not well-formed."""
    tables = set()
    while content:
        counts = content[1:HUFFMAN_HEAD]
        codes, free = sum(counts), 1
        for count in counts:
            free = 2 * free - count
            if free < 1:  # too many codes of that length; one of ones alone is not allowed
                return None
        if len(content) < HUFFMAN_HEAD + codes or not codes or content[0] & 0xEE:
            return None
        tables.add(content[0])
        content = content[HUFFMAN_HEAD + codes :]
    return tables


def _blocks(header: JpegImageFile) -> int:
    """The blocks that a scan of all components codes."""
    width, height = header.size
    samplings = [(across, down) for _, across, down, _ in header.layer]
    if len(samplings) == 1:  # of which the sampling says nothing
        samplings = [(1, 1)]
    across, down = (BLOCK * max(each) for each in zip(*samplings, strict=True))
    units: int = -(-width // across) * -(-height // down)
    return units * sum(a * d for a, d in samplings)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The marker, the start and the end of each segment up to the first scan's header. They end
    early before fill bytes, markers without a segment, and lengths that cannot be."""
    position = len(START)
    for _ in range(MAX_SEGMENTS):
        head = data[position : position + 4]
        length = int.from_bytes(head[2:], "big")
        if len(head) < 4 or head[0] != 0xFF or head[1] == 0xFF or length < 2:
            return
        end = position + 2 + length
        yield head[1], position, end
        if head[1] == SCAN:
            return
        position = end
