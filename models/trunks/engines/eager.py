"""PyTorch without compilation: runs every module."""

from torch import Tensor, nn

from models.trunks.engines.base import Engine, Pass, PassKey


class Eager(Engine):
    name = "eager"

    def build(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        return module
