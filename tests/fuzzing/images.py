"""Hostile images: every format that Pillow writes, damaged, lying, looping, and bombs."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import Any

import numpy as np
from PIL import Image, features

from tests.fuzzing.mutations import NUMBERS, mutate

MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L", "1", "RGB"),
    "BMP": ("RGB", "L", "P", "1", "RGBA"),
    "TIFF": ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "F", "LAB", "YCbCr"),
}
# What is opened by Pillow and not served, which must be refused.
OTHERS = (
    "DIB", "ICO", "ICNS", "PPM", "PCX", "TGA", "SGI", "IM", "MSP", "SPIDER", "DDS", "BLP", "QOI",
    "EPS", "PDF", "XBM", "JPEG2000", "MPO", "AVIF",
)  # fmt: skip
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4")
ORIENTATIONS = (0, 1, 3, 6, 8, 9, 65_535)


def hostile_image(number: int) -> bytes:
    """The image of that number."""
    random = Random(number)
    return random.choices(KINDS, WEIGHTS)[0](random)


def _pixels(random: Random, mode: str) -> Image.Image:
    width, height = random.choice(((1, 1), (17, 5), (64, 48), (200, 1), (240, 160)))
    noise = np.random.default_rng(random.getrandbits(32)).integers(0, 256, (height, width, 3))
    image = Image.fromarray(noise.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return image.convert("L").convert(mode) if mode == "1" else image.convert(mode)


def _encoded(random: Random, format_name: str, **options: Any) -> bytes:
    mode = random.choice(MODES.get(format_name, ("RGB", "L", "1")))
    buffer = io.BytesIO()
    try:
        _pixels(random, mode).save(buffer, format_name, **options)
    except (OSError, ValueError, KeyError):  # this format does not have this mode or option
        _pixels(random, "RGB").convert("L").save(io.BytesIO(), "PNG")
        buffer = io.BytesIO()
        _pixels(random, "RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _options(random: Random, format_name: str) -> dict[str, Any]:
    match format_name:
        case "JPEG":
            return {
                "quality": random.choice((1, 50, 100)),
                "progressive": random.random() < 0.3,
                "subsampling": random.choice((0, 1, 2)),
                "restart_marker_blocks": random.choice((0, 1)),
            }
        case "WEBP":
            return {"lossless": random.random() < 0.5}
        case "TIFF":
            return {"compression": random.choice(TIFF_COMPRESSIONS)}
        case "PNG" if random.random() < 0.3:
            return {"bits": random.choice((1, 2, 4, 8))}
    return {}


def _served(random: Random) -> bytes:
    format_name = random.choice(list(MODES))
    return _encoded(random, format_name, **_options(random, format_name))


def _damaged(random: Random) -> bytes:
    return mutate(random, _served(random))


def _other_format(random: Random) -> bytes:
    image = _encoded(random, random.choice(OTHERS))
    return image if random.random() < 0.5 else mutate(random, image)


def _no_image(random: Random) -> bytes:
    magic = (
        b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\xff\x7fWEBPVP8X", b"GIF89a",
        b"BM", b"II*\0", b"MM\0*", b"II+\0", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    )  # fmt: skip
    return random.choice(magic) + random.randbytes(random.choice((0, 1, 8, 100, 5000)))


def _lying(random: Random) -> bytes:
    """A size in the header that the pixels do not have."""
    width, height = random.choice(NUMBERS) % 2**32, random.choice(NUMBERS) % 2**32
    match random.choice(("PNG", "JPEG", "GIF", "BMP", "WEBP")):
        case "PNG":
            data = _encoded(random, "PNG")
            header = data[12:16] + struct.pack(">II", width, height) + data[24:29]
            return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
        case "JPEG":
            data = _encoded(random, "JPEG")
            place = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
            sizes = struct.pack(">HH", height % 2**16, width % 2**16)
            return data[:place] + sizes + data[place + 4 :]
        case "GIF":
            data = _encoded(random, "GIF")
            return data[:6] + struct.pack("<HH", width % 2**16, height % 2**16) + data[10:]
        case "BMP":
            data = _encoded(random, "BMP")
            return data[:18] + struct.pack("<II", width, height) + data[26:]
    canvas = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    inner = _encoded(random, "WEBP")[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMB_SIZES = ((7000, 7000), (16_384, 3000), (8000, 8000))


def _bomb(random: Random) -> bytes:
    """A small file of many pixels, up to the limit and beyond it, or of much text."""
    return _bomb_of(
        random.choice(("PNG", "GIF", "TIFF", "text", "profile")), random.choice(BOMB_SIZES)
    )


@cache
def _bomb_of(kind: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    if kind in ("text", "profile"):
        Image.new("L", (8, 8)).save(buffer, "PNG")
        name = b"zTXtk\0\0" if kind == "text" else b"iCCPp\0\0"
        return _with_chunk(buffer.getvalue(), name + zlib.compress(bytes(50 * 2**20)))
    options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    Image.new("1" if kind == "TIFF" else "L", size).save(buffer, kind, **options)
    return buffer.getvalue()


def _with_chunk(png: bytes, chunk: bytes) -> bytes:
    """A PNG with a chunk (its name and content) after its header."""
    length, check = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    return png[:33] + length + chunk + check + png[33:]


def _scans(random: Random) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    buffer = io.BytesIO()
    Image.new("RGB", (800, 600)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * random.choice((10, 1000, 4000)) + data[-2:]


def _profile(random: Random) -> bytes:
    """A colour profile that is none."""
    profile = random.choice((b"", b"acsp", random.randbytes(200), bytes(128) + b"\xff" * 400))
    format_name = random.choice(("JPEG", "PNG", "WEBP", "TIFF"))
    return _encoded(random, format_name, icc_profile=profile or b"\0")


def _ifd(random: Random, order: str) -> bytes:
    """A TIFF directory that may refer to itself, and whose entries may lie."""

    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        return struct.pack(f"{order}HHII", tag, kind, count % 2**32, value % 2**32)

    kinds, sizes = (1, 2, 3, 4, 5, 7, 12, 99), (0, 1, 2, 8, 1000, *NUMBERS)
    tags = (256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 330, 339, 34_665, 34_853, 700)
    entries = [
        entry(tag, random.choice(kinds), random.choice(sizes), random.choice((8, *sizes)))
        for tag in sorted(random.sample(tags, random.randrange(1, 12)))
    ]
    if random.random() < 0.5:
        entries.append(entry(274, 3, 1, random.choice(ORIENTATIONS) << (0 if order == "<" else 16)))
    after = random.choice((0, 8, 9, 2**32 - 1))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return (
        head
        + struct.pack(f"{order}H", len(entries))
        + b"".join(entries)
        + struct.pack(f"{order}I", after)
    )


def _directory(random: Random) -> bytes:
    """A TIFF file, or the EXIF data of another one, with such a directory."""
    directory = _ifd(random, random.choice("<>"))
    format_name = random.choice(("TIFF", "JPEG", "PNG", "WEBP"))
    if format_name == "TIFF":
        return directory + random.randbytes(random.choice((0, 100)))
    return _encoded(random, format_name, exif=b"Exif\0\0" + directory)


def _animated(random: Random) -> bytes:
    frames = [_pixels(random, "RGB").resize((32, 24)) for _ in range(random.choice((2, 5, 40)))]
    format_name = random.choice(("GIF", "PNG", "WEBP", "TIFF"))
    buffer = io.BytesIO()
    frames[0].save(buffer, format_name, save_all=True, append_images=frames[1:])
    return buffer.getvalue() if random.random() < 0.3 else mutate(random, buffer.getvalue())


def _polyglot(random: Random) -> bytes:
    first, second = _served(random), _served(random)
    return random.choice((first + second, second[: len(second) // 2] + first, first * 2))


# (kind, how often in a thousand)
_FREQUENCIES: Sequence[tuple[Callable[[Random], bytes], int]] = (
    (_served, 60), (_damaged, 480), (_other_format, 80), (_no_image, 60), (_lying, 90),
    (_bomb, 3), (_scans, 2), (_profile, 40), (_directory, 110), (_animated, 40), (_polyglot, 35),
)  # fmt: skip
KINDS = [kind for kind, _ in _FREQUENCIES]
WEIGHTS = [frequency for _, frequency in _FREQUENCIES]
assert features.check("webp")
