"""Photos from scikit-image, as JPEG."""

import io

import numpy as np
import skimage.data
from PIL import Image

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
SIZES = {"small": (640, 480), "medium": (1920, 1080), "large": (4000, 3000)}
SHARES = (1.0, 0.9, 0.8, 0.7)  # of the photos that crops show
NOISE = 4  # standard deviation, of 255 levels


def jpegs() -> list[bytes]:
    """Encoded photos of 451x300 to 640x427 pixels."""
    return [encode(Image.fromarray(getattr(skimage.data, name)())) for name in NAMES]


def photos(size: tuple[int, int]) -> list[Image.Image]:
    """16 photos: real ones and crops of them, enlarged to (width, height), with noise.

    Small sensors add such noise. Enlarged photos alone would have no fine detail.
    """
    chance = np.random.default_rng(0)
    results = []
    for share in SHARES:
        for name in NAMES:
            photo = Image.fromarray(getattr(skimage.data, name)())
            box = (0, 0, share * photo.width, share * photo.height)
            enlarged = np.asarray(photo.resize(size, Image.Resampling.LANCZOS, box))
            noise = chance.normal(0, NOISE, enlarged.shape)
            results.append(Image.fromarray((enlarged + noise).clip(0, 255).astype(np.uint8)))
    return results


def encode(photo: Image.Image) -> bytes:
    """A photo as JPEG with quality 90."""
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
