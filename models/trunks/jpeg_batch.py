"""Batches with JPEG files, which are decoded, resized and cropped on the trunk's device.

The host waits for the device where the decoder does, once for each portion of a batch, and nowhere
else. Everything is done on the current stream of the thread: a lane's own.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from models.inputs.images import ImageLimits
from models.inputs.jpeg_file import JpegFile, open_jpeg, without_metadata
from models.inputs.normalize import Normalize
from models.inputs.nvjpeg import create_jpeg_decoder
from models.inputs.tensor_transform import TensorTransform
from models.inputs.transforms import Preprocess
from models.trunks.device_errors import is_cuda_error, is_out_of_memory
from models.trunks.transfers import finish_writes

logger = logging.getLogger(__name__)

# Pixels that are decoded at a time: 200 MB as uint8.
MAX_PIXELS = 2**26
# Pixels of a file: a batch holds up to 256, which a lane decodes while others' images wait.
MAX_FILE_PIXELS = 2**23

TURNS: dict[Image.Transpose, Callable[[Tensor], Tensor]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda pixels: pixels.flip(2),
    Image.Transpose.FLIP_TOP_BOTTOM: lambda pixels: pixels.flip(1),
    Image.Transpose.ROTATE_90: lambda pixels: pixels.rot90(1, (1, 2)),
    Image.Transpose.ROTATE_180: lambda pixels: pixels.rot90(2, (1, 2)),
    Image.Transpose.ROTATE_270: lambda pixels: pixels.rot90(3, (1, 2)),
    Image.Transpose.TRANSPOSE: lambda pixels: pixels.transpose(1, 2),
    Image.Transpose.TRANSVERSE: lambda pixels: pixels.transpose(1, 2).flip(1, 2),
}


class RefusedJpegError(Exception):
    """The device's decoder does not take a file. The CPU's may."""


class JpegInputs:
    """The inputs of a trunk whose transform is `gpu`."""

    def __init__(
        self, preprocess: Preprocess, transform: TensorTransform, device: torch.device
    ) -> None:
        """
        Raises:
            CatalogError: this device decodes no JPEG files.
        """
        self.input_size = preprocess.input_size
        self.transform = transform
        self.decode = create_jpeg_decoder(device)
        self.normalize = Normalize(preprocess).to(device)

    def open(self, data: bytes, limits: ImageLimits) -> JpegFile | None:
        """A file that a `JpegBatch` takes; None for what the CPU has to decode.

        Raises:
            ImageTooLargeError, InputError: as `open_image`.
        """
        file = open_jpeg(data, limits, (3, *self.input_size))
        if file is None or file.pixels > MAX_FILE_PIXELS:
            return None
        return file if self.transform.fits_gpu(*file.size) else None


class JpegBatch:
    """A batch on the host, some of whose inputs are JPEG files.

    Attributes:
        refused: the rows of files that the decoder has not taken, once the batch was moved. Their
            pixels are black.
    """

    def __init__(
        self, inputs: JpegInputs, files: Mapping[int, JpegFile], rest: Mapping[int, Tensor]
    ) -> None:
        """
        Args:
            files: by row.
            rest: the other rows, all uint8 or all normalised float32.
        """
        self.refused: list[int] = []
        self._inputs = inputs
        self._files = files
        self._rest = rest

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Tensor:
        """The batch (B, 3, H, W) on a device, uint8, or float32 if other rows are.

        Raises:
            RuntimeError: memory ran out, or the device failed.
        """
        shape = len(self._files) + len(self._rest), 3, *self._inputs.input_size
        values = torch.zeros(shape, device=device)
        self.refused = []
        for portion in _portions(self._files):
            decoded = self._decode([self._files[row].data for row in portion], device)
            for row, pixels_CHW in zip(portion, decoded, strict=True):
                file = self._files[row]
                # Another size is not the one that was checked.
                if pixels_CHW is None or pixels_CHW.shape[:0:-1] != file.stored_size:
                    self.refused.append(row)
                    continue
                if file.transposition is not None:
                    pixels_CHW = TURNS[file.transposition](pixels_CHW)
                self._inputs.transform.write(pixels_CHW, values[row])
            del decoded, pixels_CHW  # their memory is for the next portion
        batch = values.to(torch.uint8, memory_format=torch.channels_last)
        if any(row.dtype != torch.uint8 for row in self._rest.values()):
            batch = self._inputs.normalize(batch)
        for row, pixels_CHW in self._rest.items():
            batch[row].copy_(pixels_CHW, non_blocking=non_blocking)
        return batch

    def _decode(self, files: Sequence[bytes], device: torch.device) -> Sequence[Tensor | None]:
        """Pixels (C, H, W) as they are stored; None for files that the decoder refuses."""
        try:
            return self._inputs.decode([without_metadata(data) for data in files])
        except RuntimeError as error:
            if is_out_of_memory(error) or is_cuda_error(error):
                raise
            finish_writes(device)  # raises if it was not the files' fault
            if len(files) == 1:
                logger.warning("the device does not decode a JPEG file: %s", error)
                return [None]
        return [pixels for data in files for pixels in self._decode([data], device)]


def _portions(files: Mapping[int, JpegFile]) -> Iterator[list[int]]:
    """The rows of files that are decoded together."""
    portion: list[int] = []
    pixels = 0
    for row, file in files.items():
        if portion and pixels + file.pixels > MAX_PIXELS:
            yield portion
            portion, pixels = [], 0
        portion.append(row)
        pixels += file.pixels
    yield portion
