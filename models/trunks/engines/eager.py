"""PyTorch without compilation: runs every module."""

from torch import Tensor, nn

from models.trunks.engines.base import Engine, Pass, PassKey
from models.trunks.features import PassPlan


class Eager(Engine):
    name = "eager"

    def key(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> PassKey:
        return plan, (), ()  # a module takes inputs of any size and dtype

    def build(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        return module
