"""The order of work on a GPU's streams, with stand-ins that note it. Real streams need a GPU."""

from contextlib import nullcontext
from typing import Any, Self

import pytest
import torch

from models.trunks.compute_stream import ComputeStream


class Stream:
    """Notes what it is told, in one list for all streams."""

    log: list[tuple[str, str]]
    current: "Stream"

    def __init__(self, name: Any) -> None:
        self.name = str(name)
        self.device = torch.device("cuda", 0)

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
