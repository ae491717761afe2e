"""A pass as programs of fixed shapes, one for each bucket of batch sizes."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.trunks.device_errors import is_out_of_memory
from models.trunks.engines.buckets import bucket_of
from models.trunks.features import PassPlan

# Runs on the inputs' present contents, and returns tensors that the next run overwrites.
Program = Callable[[], Mapping[str, Tensor]]
# Makes a program for these input tensors, which are its own.
Capture = Callable[[tuple[Tensor, ...]], Program]


@dataclass(slots=True)
class _Bucket:
    inputs: tuple[Tensor, ...]
    program: Program


def row_inputs(plan: PassPlan) -> tuple[int, ...] | None:
    """Which inputs of a pass have a row for each row of the batch; None if the rows of its query
    tokens are grouped, so that padding does not fit. Others are the trunk's bank of query tokens.
    """
    if not plan.query_groups:
        return (0,)
    return (0, 3) if plan.query_groups == (True,) else None


class BucketedPass:
    """Called from any thread. Rows are padded with those of earlier batches, whose outputs are cut
    off: no row of a pass depends on another one."""

    def __init__(self, capture: Capture, rows: Sequence[int]) -> None:
        """
        Args:
            rows: `row_inputs`. The other inputs are used where they are; a program is captured
                again when they have moved.
        """
        self._capture = capture
        self._rows = rows
        self._buckets: dict[tuple[int, ...], _Bucket] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        size = len(inputs[0])
        with self._lock:
            bucket = self._bucket(inputs)
            for number in self._rows:
                bucket.inputs[number][:size].copy_(inputs[number], non_blocking=True)
            outputs = bucket.program()
            rows = len(bucket.inputs[0])
            return {name: _cut(name, tensor, size, rows) for name, tensor in outputs.items()}

    def _bucket(self, inputs: tuple[Tensor, ...]) -> _Bucket:
        fixed = [tensor for number, tensor in enumerate(inputs) if number not in self._rows]
        places = tuple(tensor.data_ptr() for tensor in fixed)
        shapes = (tuple(inputs[number].shape[1:]) for number in self._rows)
        key = (bucket_of(len(inputs[0])), *(n for shape in shapes for n in shape), *places)
        if key not in self._buckets:
            own = example_inputs(inputs, self._rows, key[0])
            try:
                made = _Bucket(own, self._capture(own))
            except Exception as error:
                if is_out_of_memory(error):
                    self._give_up_old(places)
                raise
            # Those before are given up only now: graphs share a pool of memory, which ends with the
            # last one of them.
            kept = {old: bucket for old, bucket in self._buckets.items()
                    if old[len(old) - len(places) :] == places}  # fmt: skip
            self._buckets = {**kept, key: made}
        return self._buckets[key]

    def _give_up_old(self, places: tuple[int, ...]) -> None:
        """Free those for inputs that have moved but the smallest one, which holds the pool."""
        if any(key[len(key) - len(places) :] != places for key in self._buckets):
            smallest = min(self._buckets)
            self._buckets = {smallest: self._buckets[smallest]}


@torch.inference_mode(False)  # so that they can be written to in any mode
def example_inputs(inputs: Sequence[Tensor], rows: Sequence[int], size: int) -> tuple[Tensor, ...]:
    """Inputs of a pass for `size` rows: zeros where a tensor has a row for each of the batch's.

    Args:
        rows: `row_inputs`.
    """
    return tuple(
        _zeros_like(tensor, size) if number in rows else tensor
        for number, tensor in enumerate(inputs)
    )


def _zeros_like(tensor: Tensor, rows: int) -> Tensor:
    """Zeros like a tensor, in its memory layout, with so many rows."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        batch, channels, height, width = rows, *tensor.shape[1:]
        return tensor.new_zeros(batch, height, width, channels).permute(0, 3, 1, 2)
    return tensor.new_zeros(rows, *tensor.shape[1:])


def _cut(name: str, output: Tensor, size: int, rows: int) -> Tensor:
    """A copy of the outputs of the first `size` rows."""
    if name == "queries":  # (L, N, D), N the tokens of all rows
        return output[:, : output.shape[1] // rows * size].clone()
    return output[:size].clone()
