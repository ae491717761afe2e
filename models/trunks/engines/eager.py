"""PyTorch without compilation: runs every module."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.trunks.devices import DTYPES
from models.trunks.engines.base import Engine, Pass, PassKey
from models.trunks.features import PassPlan


class Eager(Engine):
    name = "eager"

    def key(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> PassKey:
        return plan, (), ()  # a module takes inputs of any size and dtype

    def build(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        dtype = DTYPES.get(self.placement.precision, torch.float32)
        return module if dtype == self.placement.dtype else Autocast(module, dtype)


class Autocast(nn.Module):
    """A float32 module that computes in a lower precision. Its outputs are float32 again."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._dtype = dtype

    def forward(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        with torch.autocast(inputs[0].device.type, self._dtype):
            outputs = self.module(*inputs)
        return {name: tensor.float() for name, tensor in outputs.items()}
