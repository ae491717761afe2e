"""torch.compile (TorchInductor). On GPUs the compiled pass is captured in CUDA graphs.
https://docs.pytorch.org/docs/stable/torch.compiler.html
"""

import inspect
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import EngineError
from models.trunks.devices import Placement, cpu_threads
from models.trunks.engines import gpu_quantization
from models.trunks.engines.base import Pass, PassSource
from models.trunks.engines.bucketed_pass import example_inputs, row_inputs
from models.trunks.engines.buckets import buckets
from models.trunks.engines.built import BuiltEngine
from models.trunks.engines.cuda_graph import (
    MIXED_QUERIES,
    GraphCapture,
    GraphedFunctions,
    graphed,
)
from models.trunks.features import PassPlan

# The rows that a pass's kernels suit, if its batches have as many.
MAX_ROWS = 16


class Compile(BuiltEngine):
    name = "compile"
    runs_wide = False  # for another number of CPU threads a pass would be compiled again

    def __init__(self, source: PassSource) -> None:
        super().__init__(source)
        self._graphs = GraphCapture(self.placement.device)
        self._functions = GraphedFunctions(self._graphs)
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
        compiled: Pass = torch.compile(
            module,
            fullgraph=True,
            options={"guard_filter_fn": _same_in_all_threads},
            **_isolated(),
        )
        threads = self._threads

        def run(*tensors: Tensor) -> Mapping[str, Tensor]:
            with cpu_threads(threads):
                return compiled(*tensors)

        # Compiled here for all sizes: later, the lane that needs a program first would wait for it.
        # One program is for any number of rows, one for a single row, which the compiler treats as
        # a size of its own.
        for size in (self._example_rows, 1):
            examples = example_inputs(inputs, rows, size)
            for number, tensor in enumerate(examples):
                if number not in rows:  # a bank of query tokens, which grows
                    torch._dynamo.mark_dynamic(tensor, 1)
                elif size > 1:
                    torch._dynamo.mark_dynamic(tensor, 0)
            run(*examples)
        return graphed(plan, run, self._graphs) if inputs[0].is_cuda else run

    @property
    def _threads(self) -> int:
        """The CPU threads of a pass: a lane's share. On a GPU they would do nothing."""
        if self.placement.device.type != "cpu":
            return 1
        threads = self.placement.threads or len(os.sched_getaffinity(0))
        return max(1, threads // self.placement.streams)

    @property
    def _example_rows(self) -> int:
        """No more than the trunk's batches have, for which alone there may be memory."""
        entry = self.source.entry
        cap = None if entry is None else entry.batch_cap(self.placement.device.type)
        return max(2, min(MAX_ROWS, cap or MAX_ROWS))

    @property
    def nbytes(self) -> int:
        return 0 if self._quantizer is None else self._quantizer.nbytes

    def recorded(self, key: Hashable, function: Pass, rows: Sequence[int]) -> Pass:
        if self.placement.device.type != "cuda":
            return function
        return self._functions.get(key, function, rows)

    def warm_up_sizes(self, largest: int) -> list[int]:
        return buckets(largest) if self.placement.device.type == "cuda" else [1, largest]


def _isolated() -> dict[str, Any]:
    """Each pass has programs of its own: all together would soon be too many for torch's limit. Its
    older releases cannot do that."""
    known = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if known else {}


def _same_in_all_threads(guards: Sequence[Any]) -> list[bool]:
    """Which guards of a program are kept: not those on what hooks hold for each thread
    (`PerThread`). A pass begins with nothing there, but a thread's first one would be compiled
    again, since the attributes are not there yet."""
    return ["_local" not in guard.name for guard in guards]
