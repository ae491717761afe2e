"""int8 and fp8 on NVIDIA GPUs: linear layers quantised by torchao, weights once, and activations
in each pass, row by row. The rest of the pass is in bfloat16. https://github.com/pytorch/ao
"""

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import EngineError
from models.trunks.devices import Placement, Precision
from models.trunks.pixel_input import PixelInput

# The compute capabilities whose tensor cores have them: Ampere's, Ada's.
CAPABILITIES: Mapping[Precision, tuple[int, int]] = {"int8": (8, 0), "fp8": (8, 9)}
# What the kernels need of a layer's sizes.
MULTIPLE = 16


def check(placement: Placement) -> None:
    """Check that passes can be quantised on a device.

    Raises:
        EngineError: not an NVIDIA GPU, one without such tensor cores, or torchao is not installed.
    """
    precision, device = placement.precision, placement.device
    if device.type != "cuda":
        raise EngineError(f"compile computes in {precision} on NVIDIA GPUs, not on {device.type}")
    needed, found = CAPABILITIES[precision], torch.cuda.get_device_capability(device)
    if found < needed:
        raise EngineError(
            f"{precision} needs a GPU of compute capability {'.'.join(map(str, needed))}; "
            f"this one has {'.'.join(map(str, found))}"
        )
    if find_spec("torchao") is None:
        raise EngineError(f"{precision} needs torchao: pip install 'vitrail[gpu]'")


class Quantizer:
    """Makes quantised copies of a trunk's float32 passes. They share one copy of the network."""

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self._copies: dict[int, Any] = {}  # by the original's id, as `copy.deepcopy` keeps them
        self._networks: list[nn.Module] = []

    def __call__(self, module: nn.Module) -> "QuantizedPass":
        """The copy of a pass's module."""
        copied = copy.deepcopy(module, self._copies)
        for part in copied.children():
            if isinstance(part, PixelInput):
                part.dtype = torch.bfloat16  # pixels are normalised in float32
            elif all(part is not network for network in self._networks):
                _quantize(part.to(torch.bfloat16), self._precision)
                self._networks.append(part)
        return QuantizedPass(copied)

    @property
    def nbytes(self) -> int:
        """Bytes of the copy's weights."""
        return sum(
            tensor.nbytes
            for network in self._networks
            for parameter in network.parameters()
            for tensor in _parts(parameter)
        )


class QuantizedPass(nn.Module):
    """A pass whose network is in bfloat16 and quantised. Its outputs are float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Tensor, *query_inputs: Tensor) -> dict[str, Tensor]:
        rounded = [
            tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            for tensor in query_inputs
        ]
        return {name: tensor.float() for name, tensor in self.module(batch, *rounded).items()}


def _quantize(module: nn.Module, precision: Precision) -> None:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    configs = {
        "int8": lambda: Int8DynamicActivationInt8WeightConfig(granularity=PerRow()),
        "fp8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    }
    quantize_(module, configs[precision](), filter_fn=_is_suitable)


def _is_suitable(layer: nn.Module, name: str) -> bool:
    if not isinstance(layer, nn.Linear):
        return False
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def _parts(parameter: Any) -> list[Tensor]:
    """What a parameter is stored as: integers and scales, if it is quantised."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter]
    names, _ = parameter.__tensor_flatten__()
    return [getattr(parameter, name) for name in names]
