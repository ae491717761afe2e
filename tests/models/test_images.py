import contextlib
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.errors import ImageTooLargeError, InputError
from models.inputs.canvas import canvas_size
from models.inputs.images import ImageLimits, decode_image
from tests.conftest import encode


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_give_the_same_pixels(
    photos: dict[str, Image.Image], image_format: str
) -> None:
    options = {"lossless": True} if image_format == "WEBP" else {}
    decoded = decode_image(encode(photos["chelsea"], image_format, **options))
    assert np.array_equal(np.asarray(decoded), np.asarray(photos["chelsea"]))


def test_jpeg_is_what_pillow_decodes(jpegs: dict[str, bytes]) -> None:
    expected = Image.open(io.BytesIO(jpegs["coffee"])).convert("RGB")
    assert np.array_equal(np.asarray(decode_image(jpegs["coffee"])), np.asarray(expected))


def test_the_first_frame_of_an_animation_is_taken() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    for image_format in ("GIF", "WEBP"):
        data = encode(red, image_format, save_all=True, append_images=[blue], duration=50)
        pixel = decode_image(data).getpixel((4, 4))
        assert isinstance(pixel, tuple)
        assert pixel[0] > 200
        assert pixel[2] < 50


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    upright = decode_image(encode(image, "PNG", exif=exif))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (0, 0, 0)
    assert upright.getpixel((10, 35)) == (255, 255, 255)


def test_formats_of_phones_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"HEIC, AVIF and video files are not .* send JPEG"):
        decode_image(encode(Image.new("RGB", (8, 8)), "AVIF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0)).convert(mode)
    assert decode_image(encode(clear, "PNG")).getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "colour"), [("P", 0), ("L", 0), ("RGB", (0, 0, 0))])
def test_a_transparent_colour_is_white(mode: str, colour: int | tuple[int, int, int]) -> None:
    data = encode(Image.new(mode, (4, 4), colour), "PNG", transparency=colour)
    assert decode_image(data).getpixel((1, 1)) == (255, 255, 255)


def test_half_transparent_red_on_white_is_pink() -> None:
    data = encode(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "PNG")
    assert decode_image(data).getpixel((0, 0)) == (255, 127, 127)


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    grey = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    for image_format in ("PNG", "TIFF"):
        decoded = np.asarray(decode_image(encode(Image.fromarray(grey), image_format)))
        assert decoded[0, :, 0].tolist() == [0, 0x12, 0x80, 0xFF]


def test_cmyk_palette_grey_and_bilevel_become_rgb(photos: dict[str, Image.Image]) -> None:
    for mode in ("CMYK", "P", "L", "1"):
        image = photos["chelsea"].convert(mode)
        data = encode(image, "TIFF" if mode in ("CMYK", "1") else "PNG")
        assert np.array_equal(np.asarray(decode_image(data)), np.asarray(image.convert("RGB")))


def test_one_pixel_is_an_image() -> None:
    assert decode_image(encode(Image.new("RGB", (1, 1)), "PNG")).size == (1, 1)


def test_every_truncation_of_a_file_is_refused_or_decodes(jpegs: dict[str, bytes]) -> None:
    for share in (0.001, 0.01, 0.3, 0.9):
        with pytest.raises(InputError):
            decode_image(jpegs["astronaut"][: int(len(jpegs["astronaut"]) * share)])


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\xff\xd8\xff\xe0", b"GIF89a", b"<svg xmlns='...'/>", bytes(1000)]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InputError):
        decode_image(data)


def test_flipped_bytes_never_raise_anything_but_input_error(jpegs: dict[str, bytes]) -> None:
    chance = np.random.default_rng(0)
    small = Image.new("RGB", (32, 32), "green")
    for image_format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"):
        good = encode(small, image_format)
        for _ in range(60):
            bad = bytearray(good)
            for place in chance.integers(0, len(bad), 5):
                bad[place] = chance.integers(256)
            with contextlib.suppress(InputError):
                assert decode_image(bytes(bad), ImageLimits(max_side=1000)).mode == "RGB"


def _png_header(width: int, height: int) -> bytes:
    """A PNG that promises this size and holds hardly any pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header_alone() -> None:
    with pytest.raises(ImageTooLargeError, match="30000x30000"):
        decode_image(_png_header(30000, 30000))


def test_limits_are_exact() -> None:
    data = encode(Image.new("RGB", (30, 10)), "PNG")
    fits = ImageLimits(max_bytes=len(data), max_pixels=300, max_side=30)
    assert decode_image(data, fits).size == (30, 10)
    for limits in (
        ImageLimits(max_bytes=len(data) - 1),
        ImageLimits(max_pixels=299),
        ImageLimits(max_side=29),
    ):
        with pytest.raises(ImageTooLargeError, match="limit"):
            decode_image(data, limits)


def _webp_canvas(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunk = b"VP8X" + (10).to_bytes(4, "little") + bytes([2, 0, 0, 0]) + size
    return b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk


@pytest.mark.parametrize(
    "data", [_webp_canvas(16000, 16000), b"GIF89a" + (16000).to_bytes(2, "little") * 2 + bytes(9)]
)
def test_the_canvas_is_checked_before_pillow_makes_room_for_it(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_open(*_: object, **__: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(Image, "open", no_open)
    with pytest.raises(ImageTooLargeError, match="16000x16000"):
        decode_image(data)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"quality": 20, "exif": b"Exif"}])
def test_the_canvas_of_webp_and_gif_is_read_as_pillow_reads_it(
    photos: dict[str, Image.Image], options: dict[str, Any]
) -> None:
    for data in (
        encode(photos["chelsea"], "WEBP", **options),
        encode(photos["chelsea"].convert("RGBA"), "WEBP", **options),
        encode(photos["chelsea"], "GIF"),
    ):
        assert canvas_size(data) == photos["chelsea"].size
