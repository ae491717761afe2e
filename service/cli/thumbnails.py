"""Thumbnails of the images that `vitrail index` adds to a collection."""

from pathlib import Path

from models.errors import ModelsError
from models.inputs.images import DEFAULT_LIMITS, decode_reduced
from service.search.thumbnails import SIDE, encode_thumbnail


def make_thumbnail(image: bytes | str | Path) -> bytes | None:
    """A thumbnail; None for what cannot be decoded here, or has too much detail.

    Raises:
        OSError: the file cannot be read.
    """
    encoded = image if isinstance(image, bytes) else Path(image).read_bytes()
    try:
        return encode_thumbnail(decode_reduced(encoded, DEFAULT_LIMITS, SIDE).image)
    except ModelsError:
        return None
