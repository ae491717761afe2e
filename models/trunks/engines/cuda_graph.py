"""CUDA graphs: a pass's kernels are recorded once for each bucket of batch sizes, and started by
one call. Small networks, whose kernels take less time than starting them, gain most.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from models.errors import EngineError
from models.trunks.compute_stream import compute_stream
from models.trunks.device_errors import is_out_of_memory
from models.trunks.devices import Placement
from models.trunks.engines.base import Pass, PassSource
from models.trunks.engines.bucketed_pass import BucketedPass, Program, row_inputs
from models.trunks.engines.buckets import buckets
from models.trunks.engines.built import BuiltEngine
from models.trunks.features import PassPlan

logger = logging.getLogger(__name__)

# Runs before the capture, in which libraries choose algorithms and allocate workspaces.
WARM_UPS = 3
# Functions of one trunk that are recorded, each for up to sixteen sizes of batches.
MAX_FUNCTIONS = 16
MIXED_QUERIES = "the rows have different numbers of query tokens"


class CudaGraph(BuiltEngine):
    name = "cuda-graph"

    def __init__(self, source: PassSource) -> None:
        super().__init__(source)
        self._graphs = GraphCapture(self.placement.device)
        self._functions = GraphedFunctions(self._graphs)

    @classmethod
    def place(cls, placement: Placement) -> Placement:
        if placement.device.type != "cuda":
            raise EngineError(f"{cls.name} runs on NVIDIA GPUs, not on {placement.device.type}")
        return super().place(placement)

    def build_pass(self, plan: PassPlan, module: nn.Module, inputs: tuple[Tensor, ...]) -> Pass:
        return graphed(plan, module, self._graphs)

    def recorded(self, key: Hashable, function: Pass, rows: Sequence[int]) -> Pass:
        return self._functions.get(key, function, rows)

    def warm_up_sizes(self, largest: int) -> list[int]:
        return buckets(largest)


class GraphCapture:
    """Captures passes of one trunk. Its graphs share their memory: all are replayed on the compute
    stream, one after another, and the outputs of each are copied there before the next one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        # Those that are in use: the pool ends with the last of them.
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(
        self, run: Callable[..., Mapping[str, Tensor]], inputs: tuple[Tensor, ...]
    ) -> Program:
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        # No other thread starts kernels meanwhile.
        with compute_stream(self.device).use(), torch.inference_mode():
            for _ in range(WARM_UPS):
                run(*inputs)
            graph = torch.cuda.CUDAGraph()
            # Other threads go on copying batches.
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                outputs = run(*inputs)
        self._graphs.add(graph)

        def program() -> Mapping[str, Tensor]:
            graph.replay()
            return outputs

        return program


def graphed(
    plan: PassPlan, run: Callable[..., Mapping[str, Tensor]], capture: GraphCapture
) -> Pass:
    """A pass as graphs.

    Raises:
        EngineError: its rows cannot be padded.
    """
    if (rows := row_inputs(plan)) is None:
        raise EngineError(MIXED_QUERIES)
    bucketed = BucketedPass(lambda inputs: capture(run, inputs), rows)
    # Callers other than lanes (comparisons with eager, the library) have streams of their own.
    return lambda *inputs: compute_stream(capture.device).run(bucketed, inputs)


class GraphedFunctions:
    """Functions of tensors that follow passes, as graphs. One whose capture or replay fails is
    called as it is from then on, and so are those beyond MAX_FUNCTIONS."""

    def __init__(self, capture: GraphCapture) -> None:
        self._capture = capture
        self._runs: dict[Hashable, Pass] = {}

    def get(self, key: Hashable, function: Pass, rows: Sequence[int]) -> Pass:
        """The function as graphs, see `Engine.recorded`."""
        if (run := self._runs.get(key)) is None:
            if len(self._runs) >= MAX_FUNCTIONS:
                return function
            bucketed = BucketedPass(lambda inputs: self._capture(function, inputs), rows)
            run = self._runs.setdefault(key, partial(self._run, key, function, bucketed))
        return run

    def _run(
        self, key: Hashable, function: Pass, bucketed: BucketedPass, *inputs: Tensor
    ) -> Mapping[str, Tensor]:
        try:
            return compute_stream(self._capture.device).run(bucketed, inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            outputs = function(*inputs)  # raises if the device is lost
            logger.warning("%s is not run as a graph: %s", key, error)
            self._runs[key] = function
            return outputs
