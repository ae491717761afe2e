"""The engine seam: a pass is a module with named output tensors, and an engine runs it.

A trunk describes a pass once, as a module (normalisation included) that maps input tensors to named
tensors. Eager runs that module. Other engines trace, export or compile the same module, so there is
one source of truth. Query tokens come as integer slots into a bank of tensors, so that a new head
changes no module.
"""

import threading
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.trunks.devices import Placement
from models.trunks.features import PassPlan

# Input tensors to named output tensors.
Pass = Callable[..., Mapping[str, Tensor]]


class Engine:
    """Runs the passes of one trunk. A subclass has a `name` and overrides `build`.

    `single_group`: all rows of a batch must have equally many query tokens, since the engine builds
    fixed graphs. Rows are then padded.
    """

    name: ClassVar[str]
    single_group: ClassVar[bool] = False

    def __init__(
        self, create_module: Callable[[PassPlan], nn.Module], placement: Placement
    ) -> None:
        """
        Args:
            create_module: the module of a plan's pass. Modules share the network's weights.
        """
        self._create_module = create_module
        self.placement = placement
        self._passes: dict[tuple[PassPlan, tuple[torch.dtype, ...]], Pass] = {}
        self._lock = threading.Lock()

    def run(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        """Run one pass; it is built first if it is the first one of its plan and dtypes.

        Args:
            inputs: on the device: the batch, then what `QueryBatch.inputs` returns.
        """
        key = (plan, tuple(tensor.dtype for tensor in inputs))
        if (built := self._passes.get(key)) is None:
            with self._lock:
                if (built := self._passes.get(key)) is None:
                    built = self.build(self._create_module(plan), inputs)
                    self._passes[key] = built
        return built(*inputs)

    def build(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        """Prepare a module for running.

        Args:
            inputs: the first batch, as an example of shapes and dtypes. Sizes vary later.
        """
        raise NotImplementedError
