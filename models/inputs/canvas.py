"""The canvas sizes of WebP and GIF files, read from their first bytes.

Pillow makes room for the canvas of a WebP file when it opens it, so the size must be known before.
Layouts: RFC 9649 (WebP) and GIF89a.
"""

VP8_START = b"\x9d\x01\x2a"


def canvas_size(data: bytes) -> tuple[int, int] | None:
    """The (width, height) of a WebP or GIF file; None for other files, those cut short, and GIF
    files that leave it to their frames."""
    if data[:6] in (b"GIF87a", b"GIF89a"):
        size = _number(data[6:8]), _number(data[8:10])
        return None if 0 in size else size
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    match data[12:16]:
        case b"VP8X":
            return 1 + _number(data[24:27]), 1 + _number(data[27:30])
        case b"VP8L":
            bits = _number(data[21:25])
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 " if data[23:26] == VP8_START:
            return _number(data[26:28]) & 0x3FFF, _number(data[28:30]) & 0x3FFF
    return None


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")
