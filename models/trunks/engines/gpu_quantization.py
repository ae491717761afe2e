"""int8 and fp8 on NVIDIA GPUs: linear layers quantised by torchao, weights once, and activations
in each pass, row by row. The rest of the pass is in bfloat16. https://github.com/pytorch/ao
"""

import copy
from collections.abc import Mapping
from importlib.util import find_spec

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


class QuantizedPass(nn.Module):
    """A copy of a float32 pass, quantised. Its outputs are float32 again."""

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)
        for part in self.module.children():
            if isinstance(part, PixelInput):
                part.dtype = torch.bfloat16  # pixels are normalised in float32
            else:
                part.to(torch.bfloat16)
        _quantize(self.module, precision)

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
