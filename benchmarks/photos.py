"""Photos from scikit-image, as JPEG of typical web sizes."""

import io

import skimage.data
from PIL import Image

NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def jpegs() -> list[bytes]:
    """Encoded photos of 451x300 to 640x427 pixels."""
    encoded = []
    for name in NAMES:
        buffer = io.BytesIO()
        Image.fromarray(getattr(skimage.data, name)()).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded
