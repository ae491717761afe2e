"""Clips: which frames are taken, and what is refused before it costs anything."""

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

from models.errors import ImageTooLargeError, InputError
from models.inputs.images import ImageLimits
from models.inputs.video import FrameChoice, decode_clip

CHOICE = FrameChoice(frames=4, sampling_rate=4)


def clip(count: int = 40, rate: int = 30, size: tuple[int, int] = (64, 48)) -> bytes:
    """Frames that grow brighter by 6 each."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            pixels = np.full((*size[::-1], 3), 6 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("count", "fps", "wanted"),
    [
        (40, 30.0, [12, 17, 22, 27]),
        (40, 60.0, [4, 14, 24, 35]),
        (16, 30.0, [0, 5, 10, 15]),
        (3, 30.0, [0, 2, 2, 2]),
        (1, 30.0, [0, 0, 0, 0]),
    ],
)
def test_frames_are_from_a_window_around_the_middle(
    count: int, fps: float, wanted: list[int]
) -> None:
    assert CHOICE.indices(count, fps).tolist() == wanted


def test_the_frames_are_those_that_were_chosen() -> None:
    frames = list(decode_clip(clip(), CHOICE))
    levels = [float(np.asarray(frame).mean()) / 6 for frame in frames]
    assert np.abs(np.array(levels) - CHOICE.indices(40, 30)).max() < 1


@pytest.mark.parametrize(
    "limits",
    [ImageLimits(max_bytes=100), ImageLimits(max_pixels=64 * 47), ImageLimits(max_side=63)],
)
def test_clips_over_a_limit_are_refused(limits: ImageLimits) -> None:
    with pytest.raises(ImageTooLargeError):
        list(decode_clip(clip(), CHOICE, limits))


def test_clips_that_take_too_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.inputs.video.MAX_CLIP_PIXELS", 39 * 64 * 48)
    with pytest.raises(ImageTooLargeError, match="40 frames of 64 x 48"):
        list(decode_clip(clip(), CHOICE))


def growing_clip(sizes: list[tuple[int, int]]) -> bytes:
    """A WebM with two key frames of each size; its header has the first size."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        stream: Any = container.add_stream("libvpx", rate=30)
        stream.width, stream.height = sizes[0]
        stream.pix_fmt = "yuv420p"
        for number, (width, height) in enumerate(sizes):
            encoder: Any = av.CodecContext.create("libvpx", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base = Fraction(1, 30)
            frames = []
            for place in range(2):
                pixels = np.zeros((height, width, 3), np.uint8)
                frames.append(
                    av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p")
                )
                frames[-1].pts = place
            packets = [packet for frame in [*frames, None] for packet in encoder.encode(frame)]
            for place, packet in enumerate(packets):
                packet.pts = packet.dts = 2 * number + place
                packet.time_base, packet.stream = Fraction(1, 30), stream
                container.mux(packet)
    return buffer.getvalue()


def test_frames_that_are_larger_than_the_file_says_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = growing_clip([(16, 16), (320, 320), (320, 320)])
    assert len(list(decode_clip(data, CHOICE))) == 4
    monkeypatch.setattr("models.inputs.video.MAX_CLIP_PIXELS", 3 * 320 * 320)
    with pytest.raises(ImageTooLargeError, match="larger than it says"):
        list(decode_clip(data, CHOICE))


def test_many_small_frames_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.inputs.video.MAX_CLIP_FRAMES", 39)
    with pytest.raises(ImageTooLargeError, match="more than 39 frames"):
        list(decode_clip(clip(), CHOICE))


def test_a_file_without_video_is_told() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="holds no video"):
        list(decode_clip(buffer.getvalue(), CHOICE))
