"""Photos that come with the package, for comparing engines on real pixels."""

from functools import cache
from pathlib import Path

from PIL import Image

from models.inputs.images import decode_image

# Eileen Collins, by NASA: public domain.
PHOTO = Path(__file__).with_name("astronaut.jpg")
STEP = 24  # pixels that each further photo is cropped by


@cache
def _photo() -> Image.Image:
    return decode_image(PHOTO.read_bytes())


def sample_photos(count: int) -> list[Image.Image]:
    """Different crops of one photo, RGB."""
    photo = _photo()
    width, height = photo.size
    crops = [(STEP * n) % (min(photo.size) // 2) for n in range(count)]
    return [photo.crop((cut, cut // 2, width, height - cut // 2)) for cut in crops]
