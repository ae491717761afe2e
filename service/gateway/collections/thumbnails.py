"""Thumbnails of the images in folders of the server, which no client has to make them of."""

from models.errors import InputError
from models.inputs.images import ImageLimits
from service.decoding.pool import ProcessDecoder
from service.metrics import Metrics
from service.search.thumbnails import SIDE, encode_thumbnail
from service.settings import Settings


class ThumbnailMaker:
    """Decodes images in processes, which start with the first image. Methods may be called from
    any thread."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        limits = ImageLimits(
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            max_side=settings.max_image_side,
        )
        self._decoder = ProcessDecoder(limits, settings.decode_cpu_s, metrics)

    def make(self, content: bytes) -> bytes | None:
        """A thumbnail; None for an image that cannot be decoded, or has too much detail."""
        try:
            with self._decoder.decoded(content, SIDE) as reduced:
                return encode_thumbnail(reduced.image)
        except InputError:
            return None

    def close(self) -> None:
        """Stop the processes."""
        self._decoder.close()
