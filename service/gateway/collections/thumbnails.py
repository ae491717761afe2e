"""Thumbnails of the images in folders of the server, for which no client can make them."""

import threading
from typing import TYPE_CHECKING

from models.errors import InputError
from models.inputs.images import ImageLimits
from service.metrics import Metrics
from service.search.thumbnails import SIDE, encode_thumbnail
from service.settings import Settings

if TYPE_CHECKING:
    from service.decoding.pool import ProcessDecoder


class ThumbnailMaker:
    """Decodes images in processes. They are imported and start with the first image, since most
    gateways never have one. Methods may be called from any thread."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._limits = ImageLimits(
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
            max_side=settings.max_image_side,
        )
        self._cpu_s = settings.decode_cpu_s
        self._metrics = metrics
        self._lock = threading.Lock()
        self._processes: ProcessDecoder | None = None

    def make(self, content: bytes) -> bytes | None:
        """A thumbnail; None for an image that cannot be decoded, or has too much detail."""
        try:
            with self._decoder().decoded(content, SIDE) as reduced:
                return encode_thumbnail(reduced.image)
        except InputError:
            return None

    def close(self) -> None:
        """Stop the processes."""
        with self._lock:
            if self._processes is not None:
                self._processes.close()

    def _decoder(self) -> "ProcessDecoder":
        with self._lock:
            if self._processes is None:
                from service.decoding.pool import ProcessDecoder

                self._processes = ProcessDecoder(self._limits, self._cpu_s, self._metrics)
            return self._processes
