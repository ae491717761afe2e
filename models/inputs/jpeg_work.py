"""How much work a JPEG file is to decode, counted before it is decoded.

Layout: ITU-T T.81, annex B.
"""

# Baseline, extended and progressive; all in Huffman coding. Others are rare, and slower.
FRAMES = (0xC0, 0xC1, 0xC2)
OTHER_FRAMES = {*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC}
SCAN = 0xDA
MAX_SEGMENTS = 256


def pixel_scans(data: bytes) -> int | None:
    """Pixels times scans: every scan passes over the whole image.

    libjpeg-turbo's time is within this times some 10 ns, whatever the file's other content is.

    Returns:
        At least the real number: a thumbnail's scans count, too. None for other files, and where
        the header does not state a size.
    """
    if data[:2] != b"\xff\xd8":
        return None
    position, pixels = 2, None
    for _ in range(MAX_SEGMENTS):
        segment = data[position : position + 9]
        if len(segment) < 9 or segment[0] != 0xFF:
            return None
        marker = segment[1]
        if marker == SCAN:
            # In the coded data 0xFF is followed by 0, so nothing else there looks like a scan.
            return None if pixels is None else pixels * data.count(b"\xff\xda")
        if marker in OTHER_FRAMES or (marker in FRAMES and pixels is not None):
            return None
        if marker in FRAMES:
            pixels = _number(segment[5:7]) * _number(segment[7:9])
            if not pixels:  # the height follows later
                return None
        position += 2 + _number(segment[2:4])
    return None


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")
