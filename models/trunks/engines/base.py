"""The engine seam: a pass is a module with named output tensors, and an engine runs it.

A trunk describes a pass once, as a module (normalisation included) that maps input tensors to named
tensors. Eager runs that module. Other engines trace, export or compile the same module, so there is
one source of truth. Query tokens come as integer slots into a bank of tensors, so that a new head
changes no module.
"""

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from models.catalog import TrunkEntry
from models.errors import EngineError
from models.trunks.devices import DTYPES, Placement
from models.trunks.engines.report import EngineReport
from models.trunks.features import PassPlan
from models.trunks.transfers import finish_writes

# Input tensors to named output tensors.
Pass = Callable[..., Mapping[str, Tensor]]
# What a built pass depends on: the plan, the inputs' dtypes, and the sizes of one input.
PassKey = tuple[PassPlan, tuple[torch.dtype, ...], tuple[int, ...]]


class PassSource(Protocol):
    """What an engine needs of the trunk that it runs."""

    placement: Placement
    # Changes whenever a plan's module may compute something else.
    identity: str
    # Its entry in the catalog that it was loaded from, if there is one.
    entry: TrunkEntry | None

    def create_pass(self, plan: PassPlan) -> nn.Module:
        """The module of a plan's pass. Modules share the network's weights."""

    def summary(self, batch: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
        """What a pass's outputs come down to: (B, D), and whether they are a classifier's logits.

        Args:
            batch: the first input of the pass.
            tensors: its outputs.
        """

    def samples(self, count: int) -> Sequence[Tensor]:
        """Prepared inputs with real content."""

    def collate(self, inputs: Sequence[Tensor]) -> Tensor:
        """Prepared inputs as a batch."""

    def calibration_inputs(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The placement's calibration set, prepared: images to calibrate on, and those held out.

        Raises:
            EngineError: the trunk takes no images.
        """


class Engine:
    """Runs the passes of one trunk. A subclass has a `name` and overrides `build`.

    `max_padded_queries`: all rows of a batch are padded to equally many query tokens if the longest
    has at most so many. An engine with fixed graphs then needs one graph, not one for each grouping
    of rows.
    `runs_wide`: whether a pass may be called with any number of CPU threads. If not, a lane never
    runs it on all cores.
    """

    name: ClassVar[str]
    max_padded_queries: ClassVar[int] = 0
    runs_wide: ClassVar[bool] = True

    def __init__(self, source: PassSource) -> None:
        """
        Args:
            source: the trunk. Its placement is one that `place` returned.
        """
        self.source = source
        self.placement = source.placement
        self._passes: dict[PassKey, Pass] = {}
        self._lock = threading.Lock()

    @classmethod
    def place(cls, placement: Placement) -> Placement:
        """The placement with the dtype that the network's weights need for its precision.

        Raises:
            EngineError: the engine does not compute in this precision on this device. The message
                gives the reason.
        """
        if (dtype := DTYPES.get(placement.precision)) is None:
            raise EngineError(f"{cls.name} does not compute in {placement.precision}")
        return replace(placement, dtype=dtype)

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
                    built = self.build(key, self.source.create_pass(plan), inputs)
                    finish_writes(self.placement.device)
                    self._passes[key] = built
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

    def recorded(self, key: Hashable, function: Pass, rows: Sequence[int]) -> Pass:
        """A function of tensors that follows a pass, as this engine runs it: as it is.

        Args:
            key: equal for functions that do the same.
            rows: which inputs have a row for each row of the batch, and the first one has. Outputs
                have these rows, too. The other inputs are used where they are.
        """
        return function

    def warm_up_sizes(self, largest: int) -> Sequence[int]:
        """Batch sizes to run before serving, up to the largest one that will be served: those that
        need preparation, and the largest, whose memory is allocated then."""
        return [1, largest]

    def report(self) -> EngineReport:
        """What runs the trunk's passes now."""
        return EngineReport(self.name)

    @property
    def settled(self) -> bool:
        """Whether later passes of the kinds that have run are run as the last ones were."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that built passes hold besides the network's own."""
        return 0


def pass_key(plan: PassPlan, inputs: tuple[Tensor, ...]) -> PassKey:
    """What a built pass depends on. Token ids (B, T) may have any length."""
    batch = inputs[0]
    sizes = () if batch.dim() == 2 else tuple(batch.shape[1:])
    return plan, tuple(tensor.dtype for tensor in inputs), sizes
