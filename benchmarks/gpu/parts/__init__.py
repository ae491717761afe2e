"""The parts of `benchmarks.gpu`. Each yields rows of figures."""

from collections.abc import Callable

from benchmarks.gpu.options import Options, Rows
from benchmarks.gpu.parts.ceiling import ceiling, quantised
from benchmarks.gpu.parts.fixtures import fixtures
from benchmarks.gpu.parts.heads import heads
from benchmarks.gpu.parts.lone import lone
from benchmarks.gpu.parts.recovery import recovery
from benchmarks.gpu.parts.rivals import rivals
from benchmarks.gpu.parts.served import jpeg_in, mixed, tensor_in
from benchmarks.gpu.parts.shared_memory import shared_memory
from benchmarks.gpu.parts.soak import soak
from benchmarks.gpu.parts.waiting import waiting

# By name, in the order in which they run: `tensor-in` and `jpeg-in` compare with the ceiling.
PARTS: dict[str, Callable[[Options], Rows]] = {
    "waiting": waiting,
    "fixtures": fixtures,
    "ceiling": ceiling,
    "quantised": quantised,
    "tensor-in": tensor_in,
    "jpeg-in": jpeg_in,
    "lone": lone,
    "mixed": mixed,
    "heads": heads,
    "shared-memory": shared_memory,
    "rivals": rivals,
    "recovery": recovery,
    "soak": soak,
}
# Parts that run for one network, or in one precision, at a time, so that each ends within minutes.
BY_NETWORK = ("waiting", "ceiling", "quantised", "tensor-in", "jpeg-in", "lone", "mixed", "heads")
BY_PRECISION = ("waiting", "fixtures", "ceiling")
# Parts that go on after their earlier rows when they have taken too long.
RESUMABLE = ("fixtures",)
