"""Copies between a device and the host that do not stop the device.

A copy to or from a GPU is asynchronous only with page-locked (pinned) host memory. torch's caching
allocator of pinned memory keeps a block until the copies that use it have ended.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Outputs of at most as many numbers are copied to the host together.
PACKED_NUMBERS = 2**18


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the host as one on a device, without waiting for the device."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def index_tensor(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Numbers known on the host as int64 on a device, without waiting for the device."""
    return to_device(torch.tensor(values, dtype=torch.int64), device)


def finish_writes(device: torch.device) -> None:
    """Wait until what this thread has written to a device is there: passes read it on another
    CUDA stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors to copy to the host: the small float32 ones flat and one after another in the
    first, then each large one. `unpacked` is the reverse, on the host."""
    small = [tensor.flatten() for tensor in tensors if tensor.numel() <= PACKED_NUMBERS]
    large = [tensor for tensor in tensors if tensor.numel() > PACKED_NUMBERS]
    return [torch.cat(small), *large] if small else large


def unpacked(copies: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Tensors of these shapes from what `packed` returned for them, or copies of it."""
    is_small = [shape.numel() <= PACKED_NUMBERS for shape in shapes]
    remaining = iter(copies)
    sizes = [shape.numel() for shape, small in zip(shapes, is_small, strict=True) if small]
    flat = iter(torch.split(next(remaining), sizes) if sizes else ())
    return [
        next(flat).view(shape) if small else next(remaining)
        for shape, small in zip(shapes, is_small, strict=True)
    ]
