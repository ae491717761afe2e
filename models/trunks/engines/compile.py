"""torch.compile (TorchInductor). On GPUs the compiled pass is captured in CUDA graphs.
https://docs.pytorch.org/docs/stable/torch.compiler.html
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import EngineError
from models.trunks.devices import Placement, one_thread
from models.trunks.engines import gpu_quantization
from models.trunks.engines.base import Pass, PassSource
from models.trunks.engines.bucketed_pass import example_inputs, row_inputs
from models.trunks.engines.buckets import buckets
from models.trunks.engines.built import BuiltEngine
from models.trunks.engines.cuda_graph import MIXED_QUERIES, GraphCapture, graphed
from models.trunks.features import PassPlan

# Rows that passes are compiled for: one program for all sizes, whose kernels suit this one, and
# one for a single row, which the compiler treats as a size of its own.
EXAMPLE_ROWS = (16, 1)


class Compile(BuiltEngine):
    name = "compile"

    def __init__(self, source: PassSource) -> None:
        super().__init__(source)
        self._graphs = GraphCapture(self.placement.device)
        precision = self.placement.precision
        is_quantized = precision in gpu_quantization.CAPABILITIES
        self._quantizer = gpu_quantization.Quantizer(precision) if is_quantized else None

    @classmethod
    def place(cls, placement: Placement) -> Placement:
        if placement.precision not in gpu_quantization.CAPABILITIES:
            return super().place(placement)
        gpu_quantization.check(placement)
        return replace(placement, dtype=torch.float32)  # the compiled pass alone is quantised

    def build_pass(self, plan: PassPlan, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        if (rows := row_inputs(plan)) is None:
            raise EngineError(MIXED_QUERIES)
        if self._quantizer is not None:
            module = self._quantizer(module)
        # Isolated, because all passes together would soon have too many programs.
        compiled: Pass = torch.compile(  # type: ignore[call-overload]  # its overloads are older
            module,
            fullgraph=True,
            isolate_recompiles=True,
            options={"guard_filter_fn": _same_in_all_threads},
        )

        def run(*tensors: Tensor) -> Mapping[str, Tensor]:
            with one_thread():  # for another number of CPU threads it would be compiled again
                return compiled(*tensors)

        # Compiled here for all sizes: later, the lane that needs a program first would wait for it.
        for size in EXAMPLE_ROWS:
            examples = example_inputs(inputs, rows, size)
            for number, tensor in enumerate(examples):
                if number not in rows:  # a bank of query tokens, which grows
                    torch._dynamo.mark_dynamic(tensor, 1)
                elif size > 1:
                    torch._dynamo.mark_dynamic(tensor, 0)
            run(*examples)
        return graphed(plan, run, self._graphs) if inputs[0].is_cuda else run

    @property
    def nbytes(self) -> int:
        return 0 if self._quantizer is None else self._quantizer.nbytes

    def warm_up_sizes(self, largest: int) -> list[int]:
        return buckets(largest) if self.placement.device.type == "cuda" else [1, largest]


def _same_in_all_threads(guards: Sequence[Any]) -> list[bool]:
    """Which guards of a program are kept: not those on what hooks hold for each thread
    (`PerThread`). A pass begins with nothing there, but a thread's first one would be compiled
    again, since the attributes are not there yet."""
    return ["_local" not in guard.name for guard in guards]
