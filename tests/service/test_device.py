"""How lanes use a device with streams: a stand-in whose work takes until the test lets it end. What
only CUDA itself does (pinned copies, events, graphs) needs a GPU, see
docs/guides/gpu-measuring.md."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from models.inputs.images import DEFAULT_LIMITS
from models.inputs.transforms import Preprocess
from models.started_pass import StartedPass
from models.trunks import jpeg_batch
from models.trunks.jpeg_batch import JpegBatch
from models.trunks.transfers import PACKED_NUMBERS, packed, unpacked
from service.worker.device import CPU, Batch, StreamDevice
from tests.conftest import wait_until
from tests.models.test_gpu_transform import decode_jpegs, jpeg_inputs


class StandInStreams:
    """Computes at once, but lets a batch's outputs arrive only when `finish` is set for it."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.finish = {number: threading.Event() for number in range(4)}
        self._lock = threading.Lock()
        self._now = 0

    def copy_in(self, batch: Batch) -> tuple[Tensor, int]:
        copy = batch.to(CPU).clone()
        number = int(copy.flatten()[0])
        self.log.append(("in", number))
        return copy, number

    @contextmanager
    def computing(self, after: int) -> Iterator[None]:
        with self._lock:
            self._now = after
            self.log.append(("compute", after))
            yield

    def copy_out(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], threading.Event]:
        self.log.append(("out", self._now))
        return [tensor.clone() for tensor in tensors], self.finish[self._now]

    def wait(self, event: threading.Event) -> None:
        assert event.wait(30)


def started(batch: Tensor) -> StartedPass:
    """A pass of two heads: one on all rows, one on the last row alone."""
    rows = len(batch)
    made = StartedPass([[0]] * (rows - 1) + [[0, 0]])
    made.add([(row, 0) for row in range(rows)], {"double": 2 * batch, "sum": batch.sum(1)})
    made.add([(rows - 1, 1)], {"large": torch.full((1, PACKED_NUMBERS + 1), 7, dtype=torch.int64)})
    return made


def batch_of(number: int) -> Tensor:
    return torch.full((3, 2), number, dtype=torch.uint8)


def test_a_batch_is_started_while_another_computes() -> None:
    streams = StandInStreams()
    device = StreamDevice(streams)
    with ThreadPoolExecutor(2) as lanes:
        first = lanes.submit(device.run, batch_of(1), started)
        wait_until(lambda: ("out", 1) in streams.log)
        second = lanes.submit(device.run, batch_of(2), started)
        wait_until(lambda: ("out", 2) in streams.log)
        assert not first.done()  # both are in flight
        assert not second.done()
        streams.finish[2].set()
        rows = second.result(30)
        assert not first.done()
        streams.finish[1].set()
        first.result(30)
    np.testing.assert_array_equal(rows[0][0]["double"], np.array([4, 4], np.float32))  # type: ignore[index]
    assert rows[2][0]["sum"] == np.float32(4)  # type: ignore[index]
    assert rows[2][1]["large"].shape == (PACKED_NUMBERS + 1,)  # type: ignore[index]
    assert [kind for kind, number in streams.log if number == 2] == ["in", "compute", "out"]


def test_a_lane_decodes_its_files_while_another_computes(
    monkeypatch: pytest.MonkeyPatch, jpegs: dict[str, bytes]
) -> None:
    decoding, go_on = threading.Event(), threading.Event()

    def decode(files: Sequence[bytes]) -> list[Tensor]:
        decoding.set()
        assert go_on.wait(30)
        return decode_jpegs(files)

    monkeypatch.setattr(jpeg_batch, "create_jpeg_decoder", lambda device: decode)
    inputs = jpeg_inputs(Preprocess(input_size=(96, 96), transform="gpu"))
    file = inputs.open(jpegs["coffee"], DEFAULT_LIMITS)
    assert file is not None
    streams = StandInStreams()
    device = StreamDevice(streams)
    with ThreadPoolExecutor(2) as lanes:
        first = lanes.submit(device.run, JpegBatch(inputs, {0: file}, {}), started)
        assert decoding.wait(30)
        streams.finish[1].set()
        assert len(lanes.submit(device.run, batch_of(1), started).result(30)) == 3
        assert not first.done()
        streams.finish = dict.fromkeys(range(256), streams.finish[1])
        go_on.set()
        assert len(first.result(30)) == 1


def test_a_pass_that_fails_to_start_leaves_the_device_to_the_next_one() -> None:
    streams = StandInStreams()
    device = StreamDevice(streams)

    def fail(batch: Tensor) -> StartedPass:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        device.run(batch_of(1), fail)
    streams.finish[2].set()
    assert len(device.run(batch_of(2), started)) == 3


@pytest.mark.parametrize("sizes", [[], [3], [PACKED_NUMBERS + 1], [2, PACKED_NUMBERS + 1, 0, 5]])
def test_small_outputs_are_copied_together(sizes: list[int]) -> None:
    tensors = [torch.rand(size, 1) for size in sizes]
    copies = packed(tensors)
    assert len(copies) == sum(size > PACKED_NUMBERS for size in sizes) + any(
        size <= PACKED_NUMBERS for size in sizes
    )
    back = unpacked(copies, [tensor.shape for tensor in tensors])
    assert all(torch.equal(one, other) for one, other in zip(tensors, back, strict=True))
