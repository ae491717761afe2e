import io
import itertools
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile, ImageOps
from PIL.ImageCms import ImageCmsProfile, createProfile

from models.errors import ImageTooLargeError, InputError
from models.inputs import jpeg
from models.inputs.images import (
    DEFAULT_LIMITS,
    ImageLimits,
    decode_image,
    decode_reduced,
)
from tests.conftest import encode

ORIENTATION = 0x0112
SAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "restart markers and progressive": {"restart_marker_rows": 1, "progressive": True},
    "own Huffman tables": {"optimize": True},
}
SIZES = ((1, 1), (7, 13), (17, 16), (16, 17), (9, 1), (1, 9), (33, 31), (1001, 3))


@pytest.fixture(autouse=True)
def room_for_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow writes progressive files from one buffer, which noise is too large for."""
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 2**24)


@pytest.fixture(scope="module")
def images(photos: dict[str, Image.Image]) -> list[Image.Image]:
    """Real photos, and noise of odd sizes."""
    chance = np.random.default_rng(0)
    shapes = [(height, width, 3) for width, height in SIZES]
    noise = [Image.fromarray(chance.integers(0, 256, shape, np.uint8)) for shape in shapes]
    return [*photos.values(), *noise]


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def is_decoded_without_pillow(data: bytes) -> bool:
    return jpeg.jpeg_pixels(Image.open(io.BytesIO(data)), data) is not None


def oriented(image: Image.Image, orientation: int, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encode(image, exif=exif, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_equal_pillows(images: list[Image.Image], kind: str, mode: str) -> None:
    samplings = SAMPLINGS.values() if mode == "RGB" else [0]
    for image, sampling, quality in itertools.product(images, samplings, (10, 75, 95)):
        data = encode(image.convert(mode), quality=quality, subsampling=sampling, **KINDS[kind])
        assert is_decoded_without_pillow(data)
        assert np.array_equal(np.asarray(decode_image(data)), by_pillow(data))


def test_pixels_of_a_phones_photo_equal_pillows(photos: dict[str, Image.Image]) -> None:
    profile = ImageCmsProfile(createProfile("sRGB")).tobytes()
    photo = photos["coffee"].resize((4000, 3000))
    data = oriented(photo, 6, quality=90, subsampling=2, icc_profile=profile)
    assert is_decoded_without_pillow(data)
    decoded = decode_image(data)
    assert decoded.size == (3000, 4000)
    assert np.array_equal(np.asarray(decoded), by_pillow(data))


def test_the_first_of_several_pictures_in_a_file_is_decoded(
    photos: dict[str, Image.Image],
) -> None:
    buffer = io.BytesIO()
    photos["coffee"].save(buffer, "MPO", save_all=True, append_images=[photos["chelsea"]])
    data = buffer.getvalue()
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert is_decoded_without_pillow(data)
    assert np.array_equal(np.asarray(decode_image(data)), by_pillow(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_orientation_equals_pillows(
    images: list[Image.Image], orientation: int, mode: str
) -> None:
    for image in images:
        data = oriented(image.convert(mode), orientation, quality=90)
        assert np.array_equal(np.asarray(decode_image(data)), by_pillow(data))


def test_decoded_images_can_be_used_as_pillows_own(photos: dict[str, Image.Image]) -> None:
    data = encode(photos["coffee"])
    ours, theirs = decode_image(data), Image.open(io.BytesIO(data)).convert("RGB")
    assert ours.mode == "RGB"
    for use in (
        lambda image: image.resize((100, 70), Image.Resampling.BICUBIC),
        lambda image: image.crop((10, 20, 700, 300)),
        lambda image: image.convert("L"),
        lambda image: image.transpose(Image.Transpose.ROTATE_90),
        lambda image: Image.blend(image, image.copy(), 0.5),
    ):
        assert np.array_equal(np.asarray(use(ours)), np.asarray(use(theirs)))
    ours.putpixel((0, 0), (1, 2, 3))
    assert ours.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("change", ["CMYK", "RGB components", "4:1:1"])
def test_unusual_files_are_left_to_pillow(photos: dict[str, Image.Image], change: str) -> None:
    photo = photos["chelsea"]
    if change == "CMYK":
        data = encode(photo.convert("CMYK"))
    elif change == "RGB components":
        data = encode(photo, keep_rgb=True)
    else:
        data = simplejpeg.encode_jpeg(np.asarray(photo).copy(), colorsubsampling="411")
    assert not is_decoded_without_pillow(data)
    assert np.array_equal(np.asarray(decode_image(data)), by_pillow(data))


@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_that_lacks_bytes_is_refused(
    photos: dict[str, Image.Image], progressive: bool
) -> None:
    data = encode(photos["rocket"], progressive=progressive)
    for length in (*range(len(data) - 12, len(data) - 2), len(data) // 2, 700):
        with pytest.raises(InputError, match=r"cannot be decoded|header cannot be read"):
            decode_image(data[:length])
        with pytest.raises(InputError):
            decode_reduced(data[:length], DEFAULT_LIMITS, 64)


def test_a_file_with_damaged_data_is_what_pillow_makes_of_it(
    photos: dict[str, Image.Image],
) -> None:
    good = encode(photos["chelsea"])
    chance = np.random.default_rng(0)
    outcomes = set()
    for _ in range(40):
        bad = bytearray(good)
        bad[int(chance.integers(700, len(bad)))] = int(chance.integers(256))
        try:
            expected = by_pillow(bytes(bad))
        except OSError:
            with pytest.raises(InputError):
                decode_image(bytes(bad))
            outcomes.add("refused")
        else:
            assert np.array_equal(np.asarray(decode_image(bytes(bad))), expected)
            outcomes.add("decoded")
    assert "decoded" in outcomes


def test_limits_hold_before_pixels_are_decoded(photos: dict[str, Image.Image]) -> None:
    data = encode(photos["coffee"])
    header = data[: data.index(b"\xff\xda") + 20]
    for limits in (ImageLimits(max_pixels=600 * 400 - 1), ImageLimits(max_side=599)):
        for decode in (decode_image, lambda data, limits: decode_reduced(data, limits, 64)):
            with pytest.raises(ImageTooLargeError, match="600x400"):
                decode(header, limits)


@pytest.mark.parametrize(
    ("min_side", "size"),
    [(401, (600, 400)), (201, (600, 400)), (200, (300, 200)), (100, (150, 100)), (9, (75, 50))],
)
def test_a_reduced_image_keeps_the_shorter_side(
    photos: dict[str, Image.Image], min_side: int, size: tuple[int, int]
) -> None:
    reduced = decode_reduced(encode(photos["coffee"]), DEFAULT_LIMITS, min_side)
    assert reduced.image.size == size
    assert reduced.size == (600, 400)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(641, 640), (640, 641), (640, 640), (633, 501)])
def test_a_reduced_image_is_upright_and_knows_its_full_size(
    photos: dict[str, Image.Image], orientation: int, size: tuple[int, int]
) -> None:
    data = oriented(photos["coffee"].resize(size), orientation, quality=95)
    whole = decode_image(data)
    reduced = decode_reduced(data, DEFAULT_LIMITS, 60)
    assert reduced.size == whole.size
    assert reduced.image.size == (-(-whole.width // 8), -(-whole.height // 8))
    drafted = Image.open(io.BytesIO(data))
    drafted.draft("RGB", (70, 60))
    expected = np.asarray(ImageOps.exif_transpose(drafted))
    assert np.array_equal(np.asarray(reduced.image), expected)


def test_other_formats_are_not_reduced(photos: dict[str, Image.Image]) -> None:
    reduced = decode_reduced(encode(photos["coffee"], "PNG"), DEFAULT_LIMITS, 60)
    assert reduced.image.size == reduced.size == (600, 400)
