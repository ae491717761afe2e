"""The engine seam: a pass is a module with named output tensors, and an engine runs it.

A trunk describes a pass once, as a module (normalisation included) that maps input tensors to named
tensors. Eager runs that module. Other engines trace, export or compile the same module, so there is
one source of truth. Query tokens come as integer slots into a bank of tensors, so that a new head
changes no module.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.errors import EngineError
from models.trunks.devices import Placement
from models.trunks.features import PassPlan

# Input tensors to named output tensors.
Pass = Callable[..., Mapping[str, Tensor]]
# What a built pass depends on: the plan, the inputs' dtypes, and the sizes of one input.
PassKey = tuple[PassPlan, tuple[torch.dtype, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class EngineReport:
    """What runs a trunk's passes.

    Args:
        name: the engine.
        error: its largest error on real inputs, compared with eager, over the largest value; None
            for eager itself.
        inputs: how many inputs that was measured on.
        reason: why it is not another engine.
    """

    name: str
    error: float | None = None
    inputs: int = 0
    reason: str = ""

    def to_json(self) -> dict[str, Any] | None:
        """The member `agreement` of a model's description; None for eager."""
        if self.error is None:
            return None
        return {"largest_error": self.error, "inputs": self.inputs}


class Engine:
    """Runs the passes of one trunk. A subclass has a `name` and overrides `build`.

    `max_padded_queries`: all rows of a batch are padded to equally many query tokens if the longest
    has at most so many. An engine with fixed graphs then needs one graph, not one for each grouping
    of rows.
    """

    name: ClassVar[str]
    max_padded_queries: ClassVar[int] = 0

    def __init__(
        self, create_module: Callable[[PassPlan], nn.Module], placement: Placement, identity: str
    ) -> None:
        """
        Args:
            create_module: the module of a plan's pass. Modules share the network's weights.
            identity: changes whenever a plan's module may compute something else.
        """
        self.create_module = create_module
        self.placement = placement
        self.identity = identity
        self._passes: dict[PassKey, Pass] = {}
        self._lock = threading.Lock()

    def run(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        """Run one pass; it is built first if it is the first one of its kind.

        Args:
            inputs: on the device: the batch, then what `QueryBatch.inputs` returns.
        """
        return self.get(plan, inputs)(*inputs)

    def prepare(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> None:
        """Build a pass before its first use, in the caller's thread."""
        self.get(plan, inputs)

    def get(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> Pass:
        """The built pass for a plan and inputs of such dtypes and sizes."""
        key = self.key(plan, inputs)
        if (built := self._passes.get(key)) is None:
            with self._lock:
                if (built := self._passes.get(key)) is None:
                    built = self._passes[key] = self.build(key, self.create_module(plan), inputs)
        return built

    def key(self, plan: PassPlan, inputs: tuple[Tensor, ...]) -> PassKey:
        """What a built pass depends on."""
        return pass_key(plan, inputs)

    def build(self, key: PassKey, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        """Prepare a module for running.

        Args:
            inputs: an example. The batch size varies later, and the length of texts.

        Raises:
            EngineError: the engine cannot run the module.
        """
        raise NotImplementedError

    def report(self) -> EngineReport:
        """What runs the trunk's passes now."""
        return EngineReport(self.name)


def pass_key(plan: PassPlan, inputs: tuple[Tensor, ...]) -> PassKey:
    """What a built pass depends on. Token ids (B, T) may have any length."""
    batch = inputs[0]
    sizes = () if batch.dim() == 2 else tuple(batch.shape[1:])
    return plan, tuple(tensor.dtype for tensor in inputs), sizes


@torch.inference_mode()
def largest_error(module: nn.Module, built: Pass, inputs: tuple[Tensor, ...]) -> float:
    """The largest difference between a built pass and its module, over the largest value of the
    output that it is in.

    Raises:
        EngineError: outputs of other names or shapes, or a difference that is not finite.
    """
    expected, actual = module(*inputs), built(*inputs)
    if expected.keys() != actual.keys():
        raise EngineError(f"outputs {sorted(actual)} instead of {sorted(expected)}")
    worst = 0.0
    for name, reference in expected.items():
        if reference.shape != actual[name].shape:
            raise EngineError(
                f"{name} has shape {tuple(actual[name].shape)} instead of {tuple(reference.shape)}"
            )
        if reference.numel():
            difference = (actual[name].float() - reference.float()).abs().max()
            scale = reference.float().abs().max().clamp(min=1e-12)
            error = float(difference / scale)
            if not math.isfinite(error):
                raise EngineError(f"{name} has values that are not finite")
            worst = max(worst, error)
    return worst
