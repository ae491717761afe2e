"""nvJPEG, by torchcodec: JPEG files of a batch to pixels on an NVIDIA GPU."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.errors import CatalogError
from models.inputs.samples import PHOTO

# Files to (C, H, W) uint8 each, of one channel for grey files. Raises RuntimeError if a file cannot
# be decoded, for all of them. The device's current stream has finished when it returns.
DecodeJpegs = Callable[[Sequence[bytes]], list[Tensor]]


def create_jpeg_decoder(device: torch.device) -> DecodeJpegs:
    """The decoder of a GPU, tried on one file.

    Raises:
        CatalogError: not an NVIDIA GPU; torchcodec is not installed, or does not decode there.
    """
    if device.type != "cuda":
        raise CatalogError(f"the gpu transform needs an NVIDIA GPU; the device is {device}")
    return torchcodec_decoder(device)


def torchcodec_decoder(device: torch.device) -> DecodeJpegs:
    """torchcodec's decoder of a device, CPUs included.

    Raises:
        CatalogError: as `create_jpeg_decoder`.
    """
    try:
        from torchcodec.decoders import decode_jpeg
    except ModuleNotFoundError as error:
        raise CatalogError(
            "the gpu transform needs torchcodec: pip install 'vitrail[gpu]'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:  # its libraries do not load
        raise CatalogError(f"torchcodec cannot be loaded: {error}") from error

    def decode(files: Sequence[bytes]) -> list[Tensor]:
        # Given bytes, torchcodec turns warnings off by `catch_warnings`, which is not thread-safe.
        tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        decoded: list[Tensor] = decode_jpeg(tensors, mode="UNCHANGED", device=device)
        return decoded

    try:
        decode([PHOTO.read_bytes()])
    except RuntimeError as error:
        raise CatalogError(f"torchcodec cannot decode JPEG files on {device}: {error}") from error
    return decode
