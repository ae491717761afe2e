"""The small pictures that searches show images by."""

import io

from PIL import Image

from service.search.collection import MAX_THUMBNAIL

SIDE = 192  # pixels of the longer side
QUALITY = 60


def encode_thumbnail(image: Image.Image) -> bytes | None:
    """An RGB image as a WebP of some kilobytes; None if it has too much detail for one.

    Args:
        image: at least SIDE pixels at the shorter side, if it has been reduced. It is made smaller.
    """
    image.thumbnail((SIDE, SIDE))
    written = io.BytesIO()
    image.save(written, "WEBP", quality=QUALITY)
    content = written.getvalue()
    return content if len(content) <= MAX_THUMBNAIL else None
