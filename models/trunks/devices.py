"""Where and how a trunk computes: device, dtype, memory layout and engine."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from models.errors import CatalogError
from models.inputs.transforms import TransformName

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where and how a trunk computes.

    Args:
        channels_last: the memory layout that convolutions prefer on CPUs.
        engine: the name of the engine that runs passes, see `models/trunks/engines`.
        transform: how images are resized, see `models/inputs/transforms.py`.
        threads: CPU threads of an engine that has threads of its own; 0: all cores.
        streams: passes that run at the same time.
        cache: a folder where engines keep what they have built; None: nowhere.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    engine: str = "eager"
    transform: TransformName = "exact"
    threads: int = 0
    streams: int = 1
    cache: Path | None = None

    def apply(self, network: nn.Module) -> nn.Module:
        """Move a network to the device and freeze it for inference."""
        network = network.eval().requires_grad_(False).to(self.device, self.dtype)
        return network.to(memory_format=self.memory_format)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def resolve_device(device: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N` as a device; `auto` is the first GPU if there is one, else the CPU.

    Raises:
        CatalogError: an unknown device, or a GPU where torch sees none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise CatalogError(f"unknown device {device!r}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise CatalogError(f"device {device!r} needs a GPU, and torch sees none")
    return resolved


def resolve_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` as torch's dtype.

    Raises:
        CatalogError: another name.
    """
    if name not in DTYPES:
        raise CatalogError(f"unknown dtype {name!r}; supported: {', '.join(DTYPES)}")
    return DTYPES[name]
