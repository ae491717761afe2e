"""Small pictures of the images that `vitrail index` adds to a collection."""

import io
from pathlib import Path

from models.errors import ModelsError
from models.inputs.images import DEFAULT_LIMITS, decode_reduced

SIDE = 192  # pixels of the longer side
QUALITY = 60


def make_thumbnail(image: bytes | str | Path) -> bytes | None:
    """A WebP of some kilobytes; None for what cannot be decoded here.

    Raises:
        OSError: the file cannot be read.
    """
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    try:
        small = decode_reduced(content, DEFAULT_LIMITS, SIDE).image
    except ModelsError:
        return None
    small.thumbnail((SIDE, SIDE))
    written = io.BytesIO()
    small.save(written, "WEBP", quality=QUALITY)
    return written.getvalue()
