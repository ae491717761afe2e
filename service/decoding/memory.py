"""The memory that a worker shares with one decoding process: an encoded image, then its pixels."""

import mmap
import os

from models.inputs.images import ImageLimits

ALIGNMENT = mmap.PAGESIZE
# More than this is given back to the system after each image.
KEPT_BYTES = 64 * 2**20


class SharedMemory:
    """Room for the largest image. Pages take memory only once they are written."""

    def __init__(self, limits: ImageLimits, file: int | None = None) -> None:
        """
        Args:
            file: the file descriptor of the other side's memory; None to create it.
        """
        self.pixels_offset = -(-limits.max_bytes // ALIGNMENT) * ALIGNMENT
        size = self.pixels_offset + 4 * limits.max_pixels + ALIGNMENT
        if file is None:
            file = os.memfd_create("vitrail-image")
            os.truncate(file, size)
        self.file = file
        self.map = mmap.mmap(file, size)
        self.view = memoryview(self.map)

    @property
    def pixels(self) -> memoryview:
        """The part for pixels: (H, W, 4) uint8 from its start."""
        return self.view[self.pixels_offset :]

    def trim(self, encoded_bytes: int, pixel_bytes: int) -> None:
        """Give the pages of a large image back."""
        for offset, count in ((0, encoded_bytes), (self.pixels_offset, pixel_bytes)):
            if count > KEPT_BYTES:
                self.map.madvise(mmap.MADV_REMOVE, offset, count)

    def close(self) -> None:
        """Close the file. The mapping ends with the last object that uses it."""
        os.close(self.file)
