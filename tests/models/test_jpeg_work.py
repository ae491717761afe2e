"""The work that a JPEG file is to decode, by its markers."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.inputs.jpeg_work import pixel_scans
from tests.conftest import encode

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
BASELINE = encode(PHOTO)
FRAME = BASELINE.index(b"\xff\xc0")


def changed(marker: int = 0xC0, height: int = 30) -> bytes:
    """The baseline file with another frame header."""
    head = bytes([0xFF, marker]) + BASELINE[FRAME + 2 : FRAME + 5] + height.to_bytes(2, "big")
    return BASELINE[:FRAME] + head + BASELINE[FRAME + 7 :]


def test_a_baseline_file_has_one_scan() -> None:
    assert pixel_scans(BASELINE) == 40 * 30
    assert pixel_scans(encode(PHOTO.convert("L"))) == 40 * 30


def test_every_scan_counts() -> None:
    progressive = encode(PHOTO, progressive=True)
    scans = progressive.count(b"\xff\xda")
    assert scans > 3
    assert pixel_scans(progressive) == 40 * 30 * scans
    last = progressive[progressive.rindex(b"\xff\xda") : -2]
    assert pixel_scans(progressive[:-2] + 1000 * last) == 40 * 30 * (scans + 1000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encode(PHOTO, "PNG"),
        BASELINE[:FRAME],
        BASELINE[: FRAME + 5],
        changed(height=0),
        changed(marker=0xC9),  # arithmetic coding
        BASELINE[:FRAME] + BASELINE[FRAME:-2].replace(b"\xff\xc4", b"\xff\xc0"),  # two frames
        BASELINE[:2] + b"\xff\xfe\0\2" * 300 + BASELINE[2:],
        BASELINE[:2] + b"\0" + BASELINE[2:],
    ],
)
def test_files_without_a_plain_header_have_no_known_work(data: bytes) -> None:
    assert pixel_scans(data) is None


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"optimize": True}, {"quality": 100}]
)
def test_common_files_have_known_work(mode: str, options: dict[str, Any]) -> None:
    assert pixel_scans(encode(PHOTO.convert(mode), **options)) is not None
