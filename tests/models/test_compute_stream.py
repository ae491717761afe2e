"""The order of work on a GPU's streams, with stand-ins that note it. Real streams need a GPU."""

from contextlib import nullcontext
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from models.started_pass import StartedPass
from models.trunks.compute_stream import ComputeStream
from service.worker.device import CudaStreams, StreamDevice


class Stream:
    """Notes what it is told, in one list for all streams."""

    log: list[tuple[str, str]]
    current: "Stream"

    def __init__(self, name: Any) -> None:
        self.name = str(name)
        self.device = torch.device("cuda", 0)

    def record_event(self) -> str:
        Stream.log.append((self.name, "event"))
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        Stream.log.append((self.name, f"waits for {event}"))

    def wait_stream(self, other: "Stream") -> None:
        Stream.log.append((self.name, f"waits for {other.name}"))

    def __enter__(self) -> Self:
        self._before, Stream.current = Stream.current, self
        return self

    def __exit__(self, *error: object) -> None:
        Stream.current = self._before


class Output:
    """A tensor on a device."""

    def record_stream(self, stream: Stream) -> None:
        Stream.log.append((stream.name, "keeps the output"))


@pytest.fixture
def compute(monkeypatch: pytest.MonkeyPatch) -> ComputeStream:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("compute"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    Stream.log, Stream.current = [], Stream("caller")
    return ComputeStream(torch.device("cuda", 0))


class Event:
    """An event whose waiting thread sleeps."""

    def __init__(self, *, blocking: bool) -> None:
        assert blocking

    def record(self, stream: Stream) -> None:
        Stream.log.append((stream.name, "event"))

    def synchronize(self) -> None:
        Stream.log.append(("host", "waits"))


def run(*inputs: Any) -> dict[str, Any]:
    Stream.log.append((Stream.current.name, "runs"))
    return {"features": Output()}


def test_a_caller_on_another_stream_waits_and_is_waited_for(compute: ComputeStream) -> None:
    compute.run(run, ())
    assert Stream.log == [
        ("compute", "waits for caller"),
        ("compute", "runs"),
        ("caller", "waits for compute"),
        ("caller", "keeps the output"),
    ]


def test_a_lane_on_the_stream_waits_for_nothing(compute: ComputeStream) -> None:
    with compute.use():
        compute.run(run, ())
    assert Stream.log == [("compute", "runs")]


def test_a_lane_copies_on_a_stream_of_its_own_around_its_pass(
    compute: ComputeStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to(batch: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        assert non_blocking
        Stream.log.append((Stream.current.name, "copies"))
        return batch.clone()

    def copy_(host: Tensor, tensor: Tensor, *, non_blocking: bool) -> Tensor:
        assert non_blocking
        Stream.log.append((Stream.current.name, "copies"))
        return host

    def empty(shape: torch.Size, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        return torch.zeros(shape, dtype=dtype)

    def record_stream(tensor: Tensor, stream: Stream) -> None:
        Stream.log.append((stream.name, "keeps a tensor"))

    monkeypatch.setattr("service.worker.device.compute_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copy"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "copy_", copy_)
    monkeypatch.setattr(Tensor, "record_stream", record_stream)

    def start(batch: Tensor) -> StartedPass:
        Stream.log.append((Stream.current.name, "runs"))
        started = StartedPass([[0], [0]])
        started.add([(0, 0), (1, 0)], {"features": batch})
        return started

    rows = StreamDevice(CudaStreams(torch.device("cuda", 0))).run(torch.ones(2, 3), start)
    assert [len(row) for row in rows] == [1, 1]
    assert Stream.log == [
        ("copy", "copies"),
        ("compute", "keeps a tensor"),  # the batch, which belongs to the copying stream
        ("copy", "event"),
        ("compute", "waits for event of copy"),
        ("compute", "runs"),
        ("compute", "event"),
        ("copy", "waits for event of compute"),
        ("copy", "keeps a tensor"),  # an output, which belongs to the computing stream
        ("copy", "copies"),
        ("copy", "event"),
        ("host", "waits"),
    ]
    assert Stream.current.name == "caller"
