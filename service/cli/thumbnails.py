"""Small pictures of the images that `vitrail index` adds to a collection."""

import io
from pathlib import Path

from models.errors import ModelsError
from models.inputs.images import DEFAULT_LIMITS, decode_reduced
from service.search.collection import MAX_THUMBNAIL

SIDE = 192  # pixels of the longer side
QUALITY = 60


def make_thumbnail(image: bytes | str | Path) -> bytes | None:
    """A WebP of some kilobytes; None for what cannot be decoded here, or has too much detail.

    Raises:
        OSError: the file cannot be read.
    """
    encoded = image if isinstance(image, bytes) else Path(image).read_bytes()
    try:
        small = decode_reduced(encoded, DEFAULT_LIMITS, SIDE).image
    except ModelsError:
        return None
    small.thumbnail((SIDE, SIDE))
    written = io.BytesIO()
    small.save(written, "WEBP", quality=QUALITY)
    content = written.getvalue()
    return content if len(content) <= MAX_THUMBNAIL else None
