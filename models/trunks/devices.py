"""Where and how a trunk computes: device, precision, memory layout and engine."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from models.errors import CatalogError
from models.inputs.transforms import TransformName
from models.trunks.calibration import CalibrationSet
from models.trunks.transfers import finish_writes

Precision = Literal["float32", "bfloat16", "float16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# The precisions that are dtypes of torch's, in which a whole network can be.
DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# A network with as many convolutions is one of convolutions: a ViT's patches take one.
MIN_CONVOLUTIONS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where and how a trunk computes."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "float32"
    # The dtype of the network's weights. `Engine.place` sets it.
    dtype: torch.dtype = torch.float32
    # The largest error over the largest value, compared with eager float32, that an engine may
    # have; None: 1e-5 for float32, and no limit for other precisions.
    tolerance: float | None = None
    # Whether weights of safetensors files stay in the files' mappings; None: those of the store.
    map_weights: bool | None = None
    # The images that int8 is calibrated on.
    calibration: CalibrationSet | None = None
    # The memory layout that convolutions prefer; None: on GPUs, for networks of convolutions.
    channels_last: bool | None = None
    # Whether float32 products on GPUs round their factors to TF32, 10 bits instead of 23.
    tf32: bool = False
    # The name of the engine that runs passes, see `models/trunks/engines`.
    engine: str = "eager"
    # How images are resized, see `models/inputs/transforms.py`.
    transform: TransformName = "exact"
    # CPU threads of an engine that has threads of its own; 0: all cores.
    threads: int = 0
    # Passes that run at the same time.
    streams: int = 1
    # A folder where engines keep what they have built; None: nowhere.
    cache: Path | None = None

    def for_network(self, network: nn.Module) -> "Placement":
        """The placement with a memory layout for this network, if it has none."""
        if self.channels_last is not None:
            return self
        convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
        suits = self.device.type == "cuda" and convolutions >= MIN_CONVOLUTIONS
        return replace(self, channels_last=suits)

    def apply(self, network: nn.Module) -> nn.Module:
        """Move a network to the device and freeze it for inference."""
        if self.device.type == "cuda":  # settings of the whole process; torch's own differ
            torch.backends.cuda.matmul.allow_tf32 = self.tf32
            torch.backends.cudnn.allow_tf32 = self.tf32
        network = network.eval().requires_grad_(False).to(self.device, self.dtype)
        network = network.to(memory_format=self.memory_format)
        finish_writes(self.device)
        return network

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def precision_key(self) -> str:
        """What decides the outputs besides weights and inputs: empty for float32, otherwise the
        precision, for int8 the calibration set's digest (on GPUs it has none), and whether TF32 is
        used."""
        keys = [] if self.precision == "float32" else [str(self.precision)]
        is_gpu = self.device.type == "cuda"
        if self.precision == "int8" and is_gpu:
            keys.append("dynamic")
        elif self.precision == "int8" and self.calibration is not None:
            keys.append(self.calibration.digest)
        if self.tf32 and is_gpu:
            keys.append("tf32")
        return " ".join(keys)


def resolve_device(device: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:N` as a device; `auto` is the first GPU if there is one, else the CPU.
    A GPU always has its number, so that one GPU is one device.

    Raises:
        CatalogError: an unknown device, or a GPU that torch does not see.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise CatalogError(f"unknown device {device!r}") from error
    if resolved.type != "cuda":
        return resolved
    if not torch.cuda.is_available():
        raise CatalogError(f"device {device!r} needs a GPU, and torch sees none")
    index, count = resolved.index or 0, torch.cuda.device_count()
    if index >= count:
        raise CatalogError(f"device {device!r}: torch sees {count} GPUs, counted from cuda:0")
    return torch.device("cuda", index)


def resolve_precision(name: str, device: torch.device) -> Precision:
    """A precision by its name; `auto` is bfloat16 on GPUs that have it, else float32.

    Raises:
        CatalogError: an unknown precision.
    """
    if name == "auto":
        # older GPUs emulate it, slowly
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return "bfloat16" if has_bfloat16 else "float32"
    for precision in PRECISIONS:
        if name == precision:
            return precision
    raise CatalogError(f"unknown precision {name!r}; supported: auto, {', '.join(PRECISIONS)}")


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Run torch's operators on so many CPU threads when called from this thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def one_thread() -> AbstractContextManager[None]:
    """Run torch's operators in the calling thread alone.

    Small operators gain nothing from more threads, and OpenMP's spin for milliseconds after each.
    """
    return cpu_threads(1)
